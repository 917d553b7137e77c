"""A large file that reaches the disk while it is written, so that its end waits for the last part only."""

from __future__ import annotations

import os
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from nemo_lmpo.runtime.threads import thread_pool

_STRETCH_BYTES = 128 * 2**20
"""What is written before the disk is asked for it."""


class SteadyFile:
    """A new file; leaving the context makes it durable, or closes it as it is after an error.

    Raises:
        OSError: it cannot be written, for example because the disk is full; from any method, also for earlier bytes.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._disk = thread_pool(1, "disk")
        self._asked: Future[None] | None = None
        self._written = 0

    def __enter__(self) -> SteadyFile:
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Bring all of it to the disk, unless there was an error."""
        try:
            if kind is None:
                self.finish()
        finally:
            self._disk.shutdown()
            with suppress(OSError):  # its last bytes do not fit either; a finished file has none left
                self._file.close()

    def finish(self) -> None:
        """Bring all of it to the disk."""
        self._wait()
        self._file.flush()
        os.fsync(self._file.fileno())

    def write(self, content: Any) -> int:
        """Append bytes, or overwrite some after :meth:`seek`; all of them."""
        size = self._file.write(content)
        self._written += size
        if self._written >= _STRETCH_BYTES and (self._asked is None or self._asked.done()):
            self._wait()
            self._written = 0
            self._file.flush()
            self._asked = self._disk.submit(os.fdatasync, self._file.fileno())
        return size

    def tell(self) -> int:
        """The position."""
        return self._file.tell()

    def seek(self, position: int) -> None:
        """Go to a position."""
        self._file.seek(position)

    def _wait(self) -> None:
        if self._asked is not None:
            self._asked.result()
            self._asked = None
