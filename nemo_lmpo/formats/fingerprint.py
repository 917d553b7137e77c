"""The identity of a model's weights: a hash of their content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from nemo_lmpo.formats.architecture import Architecture
from nemo_lmpo.formats.find_model import find_model
from nemo_lmpo.formats.peft_files import PEFT_CONFIG


def weights_fingerprint(path: Path | None, architecture: Architecture, seed: int = 0) -> str:
    """A hash over the content of a model's weight files; without a path, of what random weights are made from.

    The path is not part of it: a copied model is the same model.
    """
    digest = hashlib.sha256(repr(architecture).encode())
    if path is None:
        digest.update(f"random {seed}".encode())
        return digest.hexdigest()
    # An archive itself, or a directory's tensor files (Hugging Face or distributed checkpoint).
    found = [path] if path.is_file() else sorted(path.rglob("*"))
    for file_path in found:
        if file_path == path or file_path.suffix in (".safetensors", ".distcp"):
            digest.update(file_path.name.encode())
            with file_path.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
    if (path / PEFT_CONFIG).is_file():
        base = find_model(json.loads((path / PEFT_CONFIG).read_bytes())["base_model_name_or_path"])
        digest.update(weights_fingerprint(base.path, architecture).encode())
    return digest.hexdigest()
