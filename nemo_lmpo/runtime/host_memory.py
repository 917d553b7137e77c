"""Host memory that this process may still take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

_GROUPS = Path("/sys/fs/cgroup")
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "cache"),
)
"""Limit, usage, and what of the usage the system can give back at once: of version 2 and 1 of control groups."""


def available_bytes(own_groups: Path = Path("/proc/self/cgroup"), groups: Path = _GROUPS) -> int:
    """What the machine has available, and at most what is left of the limits that a batch job or container sets."""
    found: int = psutil.virtual_memory().available
    return min([found, *_left_of_limits(own_groups, groups)])


def _left_of_limits(own_groups: Path, groups: Path) -> Iterator[int]:
    for folder in _folders(own_groups, groups):
        for limit, usage, reclaimable in _FILES:
            most, used = _number(folder / limit), _number(folder / usage)
            if most is not None and used is not None:
                yield max(0, most - used + _statistic(folder / "memory.stat", reclaimable))


def _folders(own_groups: Path, groups: Path) -> Iterator[Path]:
    """Folders of the control groups that this process is in, innermost first."""
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = groups / "memory" if "memory" in controllers.split(",") else groups
        if controllers not in ("", "memory") and root == groups:
            continue
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            yield folder
            if folder == root:
                break


def _number(path: Path) -> int | None:
    """What a file holds; None for `max`, which is no limit, and where there is no such file."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _statistic(path: Path, name: str) -> int:
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return 0
    return next((int(line[1]) for line in lines if len(line) == 2 and line[0] == name), 0)
