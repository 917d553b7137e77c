"""Files of one JSON object a line that a run appends to, each with its `step`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from nemo_lmpo.runtime.atomic import replace_file

_logger = logging.getLogger(__name__)


def _entry(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None for one that is broken."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def cut_lines(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Remove the lines of steps after ``last_step`` and broken ones, by one atomic rename.

    Returns:
        What the lines of exactly ``last_step`` hold: these are not to be written again.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    kept: list[bytes] = []
    last: list[dict[str, Any]] = []
    broken = 0
    for line in content.splitlines(keepends=True):
        entry = _entry(line)
        if entry is None:
            broken += 1
        elif entry["step"] <= last_step:
            kept.append(line)
            if entry["step"] == last_step:
                last.append(entry)
    if broken:
        _logger.warning("%s: removed %d broken line(s), as an interrupted write leaves them", path, broken)
    remaining = b"".join(kept)
    if remaining != content:
        replace_file(path, remaining)
    return last
