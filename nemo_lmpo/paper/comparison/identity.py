"""What makes two runs the same but for their seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

NO_IDENTITY = ("name", "run_dir", "logging")
"""What a run is called and shown like does not change what comes out of it."""


def identity(settings: Mapping[str, Any]) -> str:
    """A hash of everything but the seed that decides what a run learns or costs."""
    values = {key: value for key, value in settings.items() if key not in NO_IDENTITY}
    if isinstance(values.get("model"), Mapping):
        values["model"] = {**values["model"], "seed": None}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:10]
