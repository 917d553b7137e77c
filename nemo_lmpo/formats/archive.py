"""Read access to the files of a checkpoint, in a directory or inside an uncompressed `.nemo` archive.

Archives are never unpacked: members are read where they lie, so nothing can be written outside, and a large
checkpoint needs no second copy on disk.
"""

from __future__ import annotations

import tarfile
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath
from typing import IO

from nemo_lmpo.errors import CheckpointError


class CheckpointFiles(ABC):
    """Named files; names are relative, with forward slashes."""

    origin: str
    """What errors call the place."""

    @abstractmethod
    def names(self) -> list[str]:
        """All files, those of sub-directories included."""

    @abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """A seekable stream; close it after use."""

    @abstractmethod
    def read_piece(self, name: str, offset: int, length: int) -> bytes:
        """A part of a large file; less than ``length`` bytes where it ends before."""

    def read(self, name: str) -> bytes:
        """The whole content of a small file."""
        with self.open(name) as stream:
            return stream.read()

    def read_own(self, name: str) -> bytes:
        """The same of a file that is copied.

        Raises:
            CheckpointError: it is a link out of the checkpoint.
        """
        return self.read(name)


def own_file(directory: Path, name: str) -> Path:
    """The path of a model's file that is copied without being understood: it must lie in the model's directory.

    A link out of it would put any file of this machine into what is written. Links into the cache of the hub, which
    keeps content and names apart, are its own.

    Raises:
        CheckpointError: it is a link to something else.
    """
    path = directory / name
    target = path.resolve()
    in_hub_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    if not (target.is_relative_to(directory.resolve()) or in_hub_cache):
        raise CheckpointError(
            f"{path} is a link to {target}, outside of the model; put the file itself there, or remove the link"
        )
    return path


class DirectoryFiles(CheckpointFiles):
    """The files below a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.origin = str(directory)

    def names(self) -> list[str]:
        """All files, sub-directories included."""
        found = (path for path in self._directory.rglob("*") if path.is_file())
        return sorted(path.relative_to(self._directory).as_posix() for path in found)

    def open(self, name: str) -> IO[bytes]:
        """A stream of the file."""
        return (self._directory / name).open("rb")

    def read_piece(self, name: str, offset: int, length: int) -> bytes:
        """A part of a file."""
        with self.open(name) as stream:
            return read_piece(stream, offset, length)

    def read_own(self, name: str) -> bytes:
        """The whole content of a file in the directory itself."""
        return own_file(self._directory, name).read_bytes()


class TarFiles(CheckpointFiles):
    """The members of an uncompressed tar archive.

    Raises:
        CheckpointError: not such an archive, cut off, or with members that are not plain files inside it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.origin = str(path)
        self._members: dict[str, tarfile.TarInfo] = {}
        try:
            self._archive = tarfile.open(path, "r:")  # noqa: SIM115 - members are read as long as this lives
            for member in self._archive:
                self._add(member)
        # A damaged header can hold invalid numbers, or such that no file has.
        except (tarfile.TarError, ValueError, OverflowError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(self._not_an_archive(error)) from None
        end = max((member.offset_data + member.size for member in self._members.values()), default=0)
        if end > path.stat().st_size:
            raise CheckpointError(f"{path} is cut off: its last member ends beyond the file; copy it again")

    def names(self) -> list[str]:
        """All members that are files."""
        return sorted(self._members)

    def open(self, name: str) -> IO[bytes]:
        """A stream of one member."""
        stream = self._archive.extractfile(self._members[name])
        assert stream is not None, "only plain files are members"
        return stream

    def read_piece(self, name: str, offset: int, length: int) -> bytes:
        """A part of a member, straight from the archive: `tarfile`'s stream would copy it twice."""
        member = self._members[name]
        with self._path.open("rb") as stream:
            return read_piece(stream, member.offset_data + offset, max(0, min(length, member.size - offset)))

    def _add(self, member: tarfile.TarInfo) -> None:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise CheckpointError(f"{self._path} holds '{member.name}', a path outside the archive; do not use it")
        if member.isdir():
            return
        if not member.isreg() or member.sparse is not None:
            raise CheckpointError(
                f"{self._path} holds '{member.name}', which is not a plain file (a link or device); do not use it"
            )
        if path.as_posix() in self._members:
            raise CheckpointError(f"{self._path} holds '{member.name}' twice; do not use it")
        self._members[path.as_posix()] = member

    def _not_an_archive(self, error: Exception) -> str:
        with self._path.open("rb") as stream:
            start = stream.read(2)
        if start == b"\x1f\x8b":
            return f"{self._path} is a gzip-compressed archive; decompress it first: gzip -dc FILE > OTHER.nemo"
        if "unexpected end" in str(error):
            return f"{self._path} is cut off in the middle of a member; copy it again"
        return f"{self._path} is not a NeMo file: it is not a readable tar archive ({error})"


def read_piece(stream: IO[bytes], offset: int, length: int) -> bytes:
    """A part of a file; less than ``length`` bytes where it ends before."""
    stream.seek(offset)
    return stream.read(length)
