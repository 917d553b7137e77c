"""From the name of a model, as a user writes it, to its place on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from nemo_lmpo.errors import CheckpointError, first_line

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def local_model(name: str) -> tuple[Path, str | None]:
    """The local path of ``name``, and its hub name if it came from the Hugging Face hub.

    An existing path wins; `OWNER/NAME` is downloaded into the usual cache (weights as safetensors only).

    Raises:
        CheckpointError: neither a path nor a model that can be downloaded.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path, None
    if not _HUB_NAME.fullmatch(name):
        raise CheckpointError(f"{name} does not exist; give a model directory, a .nemo file or a hub name OWNER/NAME")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from nemo_lmpo.formats.sidecars import TOKENIZER_PATTERNS

    try:
        patterns = ["model*.safetensors", "model.safetensors.index.json", *TOKENIZER_PATTERNS]
        return Path(snapshot_download(name, allow_patterns=patterns)), name
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is no local path and cannot be fetched from the hub ({first_line(error)}); "
            "check the name and your login"
        ) from None
