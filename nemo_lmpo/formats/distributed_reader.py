"""Read megatron-core distributed checkpoints without unpickling anything freely.

megatron-core and torch unpickle a checkpoint's `.metadata` and every object in it, which can run code that someone put
there. Here metadata goes through the allow-list of :mod:`nemo_lmpo.formats.safe_metadata`, and objects through torch's
own ("weights only"): tensor by tensor, in one process and without a model (:class:`DistributedCheckpoint`), or by
megatron-core itself, into the layout of a run (:func:`reading_safely`).
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from nemo_lmpo.errors import CheckpointError, counted
from nemo_lmpo.formats.architecture import parse_json
from nemo_lmpo.formats.archive import CheckpointFiles, read_piece
from nemo_lmpo.formats.safe_metadata import read_metadata

CHECKSUMS_FILE = "checksums.json"
"""Checksums of `.metadata`, and of every stored chunk by data file and offset; archives of this project have them."""
CHECKSUM = "xxh3_64"
METADATA_FILE = ".metadata"


class DistributedCheckpoint:
    """The tensors of a checkpoint that `torch.distributed.checkpoint` or megatron-core wrote.

    ``folder`` is where it lies among ``files`` (empty: at the top).

    Raises:
        CheckpointError: not such a checkpoint, damaged, or of a backend that is not supported.
    """

    def __init__(self, files: CheckpointFiles, folder: str = "") -> None:
        self.origin = f"{files.origin}/{folder}" if folder else files.origin
        self._files = files
        self._at = f"{folder}/" if folder else ""
        self._names = set(files.names())
        self._check_backend()
        content = files.read(f"{self._at}{METADATA_FILE}")
        catalog, self._checksums = self._read_checksums()
        if catalog is not None and xxhash.xxh3_64_hexdigest(content) != catalog:
            raise CheckpointError(
                f"{self.origin}: .metadata was changed after it was written (its checksum differs); "
                "copy the checkpoint again"
            )
        self._metadata = read_metadata(io.BytesIO(content), f"{files.origin}: {self._at}{METADATA_FILE}")
        self._check_data_files()
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """The tensor ``key``, or only its slice at ``index`` along the first axes.

        Raises:
            CheckpointError: the data file is damaged or does not hold all of it.
        """
        entry = self.tensors[key]
        first, size = [0] * len(entry.size), list(entry.size)
        first[: len(index)], size[: len(index)] = index, [1] * len(index)
        chunks = [(chunk, *found) for chunk in entry.chunks if (found := _overlap(chunk, first, size)) is not None]
        present = sum(math.prod(part.stop - part.start for part in here) for _, here, _ in chunks)
        if present != math.prod(size):
            raise CheckpointError(
                f"{self.origin}: {key} is incomplete ({present} of {math.prod(size)} elements); "
                "copy the checkpoint again"
            )
        if len(chunks) == 1 and list(chunks[0][0].sizes) == size:
            out = self._read_chunk(key, entry, chunks[0][0])
        else:
            out = torch.empty(size, dtype=entry.properties.dtype)
            for chunk, here, there in chunks:
                out[here].copy_(self._read_chunk(key, entry, chunk)[there])
        return out[(0,) * len(index)]

    def _read_chunk(self, key: str, entry: TensorStorageMetadata, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
        if info is None:
            raise self._unreadable(key, "its place is not recorded")
        content = self._files.read_piece(self._at + info.relative_path, info.offset, info.length)
        name, expected = info.relative_path, self._checksums.get((info.relative_path, info.offset))
        if not (as_saved(content) if expected is None else xxhash.xxh3_64_hexdigest(content) == expected):
            raise self._unreadable(key, f"{name} was changed after it was written: its checksum differs")
        try:
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        # torch.load raises several kinds of errors on damaged data; all mean the same to the user.
        except Exception as error:
            # torch goes on to advise unsafe loading.
            reason = str(error).split("\n")[0].split(". ")[0][:200]
            raise self._unreadable(key, f"{name}: {type(error).__name__}: {reason}") from None
        if not isinstance(found, Tensor) or found.shape != chunk.sizes or found.dtype != entry.properties.dtype:
            raise self._unreadable(key, f"{name} holds something else than the recorded piece of it")
        return found

    def _unreadable(self, key: str, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.origin}: {key} cannot be read ({reason}); copy the checkpoint again")

    def _check_backend(self) -> None:
        if f"{self._at}{METADATA_FILE}" in self._names:
            return
        if any(name.startswith(self._at) and name.endswith(".zarray") for name in self._names):
            raise CheckpointError(
                f"{self.origin} is a zarr checkpoint, which is not supported; save it as torch_dist with NeMo first"
            )
        said = self._json("metadata.json")
        backend = f"the '{said.get('sharded_backend')}'" if isinstance(said, dict) else "an unknown"
        raise CheckpointError(
            f"{self.origin} has no .metadata file ({backend[:80]} backend); give a torch_dist distributed checkpoint"
        )

    def _check_data_files(self) -> None:
        needed = {info.relative_path for info in self._metadata.storage_data.values()}
        outside = sorted(name for name in needed if PurePosixPath(name).name != name)
        if outside:
            raise CheckpointError(f"{self.origin}: .metadata names files outside it: {', '.join(outside)}")
        missing = sorted(name for name in needed if self._at + name not in self._names)
        if missing:
            raise CheckpointError(
                f"{self.origin} lacks {counted(len(missing), 'data file')}: {', '.join(missing)}; "
                "copy the checkpoint again"
            )

    def _read_checksums(self) -> tuple[str | None, dict[tuple[str, int], str]]:
        said = self._json(CHECKSUMS_FILE)
        if said is None:
            return None, {}
        try:
            if said["algorithm"] != CHECKSUM:
                raise ValueError(f"algorithm {said['algorithm']}")
            return str(said["metadata"]), {
                (file, int(offset)): str(checksum)
                for file, chunks in said["chunks"].items()
                for offset, checksum in chunks.items()
            }
        except (KeyError, TypeError, ValueError, AttributeError):
            raise CheckpointError(
                f"{self.origin}/{CHECKSUMS_FILE} is damaged or of a newer version; copy the checkpoint again"
            ) from None

    def _json(self, name: str) -> Any:
        if self._at + name not in self._names:
            return None
        return parse_json(self._files.read(self._at + name), f"{self.origin}/{name}")


def as_saved(content: bytes) -> bool:
    """Whether a saved tensor agrees with the checksums of its own records, which torch writes but does not compare."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, RuntimeError):
        return False


def _overlap(
    chunk: ChunkStorageMetadata, first: list[int], size: list[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a chunk meets the region that starts at ``first``: as slices of the region, and of the chunk."""
    here, there = [], []
    for start, length, at, extent in zip(chunk.offsets, chunk.sizes, first, size, strict=True):
        begin, end = max(start, at), min(start + length, at + extent)
        if begin >= end:
            return None
        here.append(slice(begin - at, end - at))
        there.append(slice(begin - start, end - start))
    return tuple(here), tuple(there)


def state_metadata(state: Path, origin: str | None = None) -> Metadata:
    """The description of a directory's tensors, objects and files; ``origin`` names the file in errors.

    Raises:
        CheckpointError: damaged, or with content that does not belong there.
        OSError: it cannot be read.
    """
    with (state / METADATA_FILE).open("rb") as stream:
        return read_metadata(stream, origin or str(state / METADATA_FILE))


def stored_pieces(metadata: Metadata) -> list[tuple[str, int, int]]:
    """File, offset and length of every tensor and object."""
    places = metadata.storage_data.values()
    return sorted((str(place.relative_path), int(place.offset), int(place.length)) for place in places)


def read_object(state: Path, key: str) -> Any:
    """An object that is not a tensor, as megatron-core keeps it: a list of what was saved under ``key``.

    Raises:
        CheckpointError: there is none, or it holds what does not belong there.
        OSError: the file cannot be read.
    """
    places = [place for index, place in state_metadata(state).storage_data.items() if index.fqn == key]
    if len(places) != 1:
        raise CheckpointError(f"{state} holds no {key}; copy the checkpoint again, or resume from an older one")
    with (state / places[0].relative_path).open("rb") as file:
        content = read_piece(file, places[0].offset, places[0].length)
    with torch.serialization.safe_globals(_numpy_names()):
        return torch.load(io.BytesIO(content), weights_only=True)


def _numpy_names() -> list[Any]:
    """What checkpoints of version 1 need for NumPy's random state."""
    multiarray = getattr(np, "_core", None) or np.core  # NumPy 1 has the latter
    return [multiarray.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]


class _SafeReader(FileSystemReader):
    """torch's reader, but for metadata."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return state_metadata(Path(self.path))


@contextmanager
def reading_safely() -> Iterator[None]:
    """Within the block, megatron-core reads the metadata of checkpoints through the allow-list."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import torch as strategy

    name = "_get_filesystem_reader"
    with ExitStack() as undo:
        for module in (strategy, serialization):
            if hasattr(module, name):  # from 0.19 on, what is not a tensor is read by a reference of its own
                undo.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, lambda directory, *args, **kwargs: _SafeReader(directory))
        yield
