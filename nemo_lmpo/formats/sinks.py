"""Write access to a new checkpoint, as a directory or as an uncompressed tar archive (`.nemo`)."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from nemo_lmpo.formats.outputs import make_durable

Content = Iterable[bytes | bytearray | memoryview]
"""A file's bytes in pieces, so that a large one is never whole in memory."""


class Sink(Protocol):
    """Takes files one after another; names are relative, with forward slashes."""

    def add(self, name: str, content: Content) -> None:
        """Write a new file."""

    def close(self) -> None:
        """Everything is written; make it durable."""


class DirectorySink:
    """Files below a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, content: Content) -> None:
        """Write a new file and make it durable."""
        path = self._directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            for piece in content:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())

    def close(self) -> None:
        """Make the directory's entries durable."""
        make_durable(self._directory)


class TarSink:
    """Members of an uncompressed tar archive, written in place: the size enters the header afterwards.

    Members have no time, so that the same model gives the same bytes.
    `tarfile` wants to know a member's size before its content, which is as large as the model.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._directories: set[str] = set()

    def add(self, name: str, content: Content) -> None:
        """Write a new member, and its directories where they are new."""
        self._add_directories(name)
        header_at = self._file.tell()
        start = header_at + self._file.write(self._header(name, tarfile.REGTYPE, 0))
        for piece in content:
            self._file.write(piece)
        size = self._file.tell() - start
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
        info.type, info.size = kind, size
        info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
        # A long name takes further blocks, as many for any size.
        return info.tobuf(tarfile.GNU_FORMAT)
