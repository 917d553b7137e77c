"""Writing small files so that nobody ever sees half of one. Imports nothing of the package."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path``; readers and crashes see either the old or the new file.

    Several processes may write the same path at once: the last one wins.

    Raises:
        OSError: it cannot be written; the old file is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def set_aside(path: Path, suffix: str) -> Path:
    """Rename ``path`` to itself with a suffix and, where that is taken, a number; the new path.

    Raises:
        OSError: it cannot be renamed.
    """
    number = 1
    target = path.with_name(path.name + suffix)
    while target.exists() or target.is_symlink():
        number += 1
        target = path.with_name(f"{path.name}{suffix}.{number}")
    path.rename(target)
    return target
