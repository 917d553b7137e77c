"""A log of answers that loses at most the line that was being written."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nemo_lmpo.errors import ConfigError, DataError
from nemo_lmpo.runtime.files import NO_LOCKS


class Journal:
    """A JSON Lines file that rows are appended to, each under its key, by any number of threads.

    A process that was killed may leave half a line at the end; it is cut off on opening, and that row is made again.
    One process has the file at a time: the system releases it when the process ends, however it ends.

    Args:
        path: the file; made with its directory if it is not there.
        key: name of the field that tells rows apart; of rows with the same key the last one counts.

    Raises:
        ConfigError: another process has it.
        DataError: a line before the last one is damaged, or the file cannot be written.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key
        self.rows: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._failure: DataError | None = None
        self._closed = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _open_alone(path)
        except OSError as error:
            raise DataError(f"{path} cannot be written ({error.strerror}); choose another place") from None
        try:
            self._recover()
        except BaseException:
            self.close()
            raise

    def _recover(self) -> None:
        content = self.path.read_bytes()
        self._length = content.rfind(b"\n") + 1
        """Bytes of whole lines."""
        for number, line in enumerate(content[: self._length].split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                self.rows[str(row[self.key])] = row
            except (ValueError, KeyError, TypeError, RecursionError):
                raise DataError(
                    f"{self.path}, line {number} is damaged; remove that line, and its row is made again"
                ) from None
        if self._length < len(content):
            os.ftruncate(self._file, self._length)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row; after the return it outlives the process.

        Raises:
            DataError: it cannot be written, or one before it could not; the rows before that one are kept.
        """
        self.extend([row])

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows at once; errors as of :meth:`append`."""
        added = [dict(row) for row in rows]
        content = b"".join(_line(row) for row in added)
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if self._closed:  # a thread that an interruption left behind
                raise DataError(f"{self.path} is closed; run the same command again")
            try:
                self._write(content)
            except OSError as error:
                self._failure = DataError(
                    f"{self.path} cannot be written ({error.strerror}); correct that, for example make room on the "
                    f"disk, then run the same command again: the {len(self.rows)} rows before are kept"
                )
                raise self._failure from None
            self.rows.update((str(row[self.key]), row) for row in added)

    def _write(self, content: bytes) -> None:
        try:
            left = memoryview(content)
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError:
            # What came after half a row would be lost with it. If this fails, too, opening cuts it off.
            with suppress(OSError):
                os.ftruncate(self._file, self._length)
            raise
        self._length += len(content)

    def close(self) -> None:
        """Give the file back; nothing can be appended any more."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _line(row: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half surrogates, which UTF-8 has no bytes for but JSON has escapes
        return (json.dumps(row) + "\n").encode()


def _open_alone(path: Path) -> int:
    """Open a file for appending that no other process has open so.

    Raises:
        ConfigError: another one has.
        OSError: it cannot be opened.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise ConfigError(f"{path} is in use by another command; wait for it, or end it") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(file)
                raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)  # its last owner removed it meanwhile
