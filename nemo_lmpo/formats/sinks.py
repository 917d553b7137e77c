"""Write access to a new checkpoint, as a directory or as an uncompressed tar archive (`.nemo`)."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from nemo_lmpo.formats.outputs import make_durable
from nemo_lmpo.formats.steady_file import SteadyFile


class Sink(Protocol):
    """Takes files one after another; names are relative, with forward slashes."""

    def open(self, name: str) -> AbstractContextManager[SteadyFile]:
        """A new file to append to, which is never whole in memory; it is complete when the context ends."""

    def add(self, name: str, content: bytes) -> None:
        """Write a new file."""

    def close(self) -> None:
        """Everything is written; make it durable."""


class DirectorySink:
    """Files below a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def open(self, name: str) -> SteadyFile:
        """A new file, durable when its context ends."""
        path = self._directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return SteadyFile(path)

    def add(self, name: str, content: bytes) -> None:
        """Write a new file and make it durable."""
        with self.open(name) as file:
            file.write(content)

    def close(self) -> None:
        """Make the directory's entries durable."""
        make_durable(self._directory)


class TarSink:
    """Members of an uncompressed tar archive, written in place: the size enters the header afterwards.

    Members have no time, so that the same model gives the same bytes.
    `tarfile` wants to know a member's size before its content, which is as large as the model.
    """

    def __init__(self, path: Path) -> None:
        self._file = SteadyFile(path)
        self._directories: set[str] = set()

    @contextmanager
    def open(self, name: str) -> Iterator[SteadyFile]:
        """A new member, and its directories where they are new."""
        self._add_directories(name)
        header_at = self._file.tell()
        start = header_at + self._file.write(self._header(name, tarfile.REGTYPE, 0))
        yield self._file
        size = self._file.tell() - start
        self._file.write(bytes(-size % tarfile.BLOCKSIZE))
        end = self._file.tell()
        self._file.seek(header_at)
        self._file.write(self._header(name, tarfile.REGTYPE, size))
        self._file.seek(end)

    def add(self, name: str, content: bytes) -> None:
        """Write a new member."""
        with self.open(name) as file:
            file.write(content)

    def close(self) -> None:
        """End the archive and make it durable."""
        with self._file as file:
            file.write(bytes(2 * tarfile.BLOCKSIZE))
            file.write(bytes(-file.tell() % tarfile.RECORDSIZE))

    def _add_directories(self, name: str) -> None:
        parts = name.split("/")[:-1]
        for depth in range(len(parts) + 1):
            directory = "/".join(parts[:depth])
            if directory not in self._directories:
                self._directories.add(directory)
                self._file.write(self._header(directory, tarfile.DIRTYPE, 0))

    def _header(self, name: str, kind: bytes, size: int) -> bytes:
        info = tarfile.TarInfo(f"./{name}" if name else ".")
        info.type, info.size = kind, size
        info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
        # A long name takes further blocks, as many for any size.
        return info.tobuf(tarfile.GNU_FORMAT)
