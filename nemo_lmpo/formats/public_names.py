"""Models and data by names that others may see: those of the hub as they are, and of paths only what they end with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nemo_lmpo.formats.find_model import hub_name_of
from nemo_lmpo.runtime.files import is_hub_name
from nemo_lmpo.runtime.run_files import CHECKPOINTS

_DATA_FILE = re.compile(r".*\.(jsonl?|parquet|arrow|csv|tsv|txt|gz|zst)", re.IGNORECASE)


def hub_names(values: Any) -> list[str]:
    """Those of the values that are names on the hub and not paths of this machine."""
    listed = values if isinstance(values, list) else [values]
    named = (one for one in listed if isinstance(one, str) and is_hub_name(one))
    return [one for one in named if not (_DATA_FILE.fullmatch(one) or Path(one).exists())]


def public_name(value: Any) -> Any:
    """A name on the hub or a builtin one as it is; of a path, its last part (and the run of a checkpoint)."""
    if not isinstance(value, str):
        return value
    value = " ".join(value.split())
    if "/" not in value.rstrip("/") or hub_names(value):
        return value
    path = Path(value)
    found = hub_name_of(path.absolute())
    if found is not None:
        return found[0]
    if path.parent.name == CHECKPOINTS:
        return f"{path.parent.parent.name}, {path.name}"
    return path.name
