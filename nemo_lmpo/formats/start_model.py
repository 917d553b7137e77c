"""The model that a run starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_lmpo.formats.architecture import Architecture


@dataclass(frozen=True)
class StartModel:
    """What a run starts from; weights are not read yet."""

    architecture: Architecture
    tokenizer: str
    """Directory, hub name or `builtin:NAME`."""
    path: Path | None = None
    """Weights on disk, in any form that conversion reads; None: random ones."""
    sidecars: Path | None = None
    """Directory with the model's own `config.json`."""
    added_ids: tuple[int, ...] = ()
    """Tokens of the tokenizer that the weights have no rows of yet."""
