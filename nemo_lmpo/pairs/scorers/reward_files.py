"""Where a reward model lies, and a hash of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from nemo_lmpo.errors import CheckpointError, first_line
from nemo_lmpo.runtime.files import is_hub_name, read_small

UNBOUNDED = 2**31
"""Tokens that a model takes which names no limit."""
_CODE_AND_WEIGHTS = (".safetensors", ".bin", ".py")


def find_reward_model(given: str) -> Path:
    """A Hugging Face directory: as it is named, or from the hub.

    Raises:
        CheckpointError: neither.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not is_hub_name(given):
        raise CheckpointError(f"--reward-model {given} does not exist; give a Hugging Face directory or a hub name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(given, ignore_patterns=["*.gguf", "*.onnx", "original/*", "*.pth"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"--reward-model {given} cannot be fetched from the hub ({first_line(error)}); check the name and your "
            "login"
        ) from None


def weights_of(directory: Path) -> str:
    """SHA-256 of the files of a reward model that decide its scores."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.name == "config.json" or path.suffix in _CODE_AND_WEIGHTS:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def positions_of(directory: Path) -> int:
    """How many tokens a reward model takes, by its `config.json`.

    Raises:
        CheckpointError: that cannot be read.
    """
    try:
        found = json.loads(read_small(directory / "config.json")).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{directory / 'config.json'} cannot be read ({first_line(error)})") from None
    return found if isinstance(found, int) and found > 0 else UNBOUNDED
