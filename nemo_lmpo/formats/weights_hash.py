"""What weights are, wherever they lie: a hash of their content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from nemo_lmpo.config.architecture import Architecture

_CHUNK = 16 * 1024 * 1024


def weights_hash(path: Path | None, architecture: Architecture, seed: int = 0) -> str:
    """A hash over the content of a model's weight files; without a path, of what random weights are made from."""
    digest = hashlib.sha256(repr(architecture).encode())
    if path is None:
        digest.update(f"random {seed}".encode())
        return digest.hexdigest()
    # The path is no part of it: a copied model is the same model.
    for file_path in _weight_files(path):
        digest.update(file_path.name.encode())
        with file_path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _weight_files(path: Path) -> list[Path]:
    """An archive itself, or a directory's tensor files (Hugging Face or distributed checkpoint)."""
    if path.is_file():
        return [path]
    return sorted(entry for entry in path.rglob("*") if entry.suffix in (".safetensors", ".distcp"))
