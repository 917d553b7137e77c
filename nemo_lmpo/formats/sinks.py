"""Write access to a new checkpoint, as a directory or as an uncompressed tar archive (`.nemo`)."""

from __future__ import annotations

import io
import os
import tarfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Protocol, cast


class Sink(Protocol):
    """Takes files one after another; names are relative, with forward slashes."""

    def create(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """A writable stream; the file is complete when the context ends."""

    def close(self) -> None:
        """Everything is written; make it durable."""


class DirectorySink:
    """Files below a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """A stream of a new file."""
        path = self._directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())

    def close(self) -> None:
        """Make the directory's entries durable."""
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class TarSink:
    """Members of an uncompressed tar archive, written in place: the size enters the header afterwards."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._directories: set[str] = set()
        self._time = int(time.time())

    @contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """A stream of a new member; only one can be open."""
        self._add_directories(name)
        header_at = self._file.tell()
        self._file.write(bytes(tarfile.BLOCKSIZE))
        member = _Member(self._file)
        yield cast(IO[bytes], member)
        size = member.tell()
        self._file.write(bytes(-size % tarfile.BLOCKSIZE))
        end = self._file.tell()
        self._file.seek(header_at)
        self._file.write(self._header(name, tarfile.REGTYPE, size))
        self._file.seek(end)

    def close(self) -> None:
        """End the archive and make it durable."""
        self._file.write(bytes(2 * tarfile.BLOCKSIZE))
        self._file.write(bytes(-self._file.tell() % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _add_directories(self, name: str) -> None:
        parts = name.split("/")[:-1]
        for depth in range(len(parts) + 1):
            directory = "/".join(parts[:depth])
            if directory not in self._directories:
                self._directories.add(directory)
                self._file.write(self._header(directory, tarfile.DIRTYPE, 0))

    def _header(self, name: str, kind: bytes, size: int) -> bytes:
        info = tarfile.TarInfo(f"./{name}" if name else ".")
        info.type, info.size, info.mtime = kind, size, self._time
        info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
        header = info.tobuf(tarfile.GNU_FORMAT)
        assert len(header) == tarfile.BLOCKSIZE, f"member name too long: {name}"
        return header


class _Member(io.RawIOBase):
    """The open member of an archive: positions count from its own start."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._start = file.tell()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell() - self._start

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        return self._file.write(data)
