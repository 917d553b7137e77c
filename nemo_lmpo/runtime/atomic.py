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
