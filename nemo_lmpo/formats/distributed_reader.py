"""Read megatron-core distributed checkpoints tensor by tensor, in one process and without a model."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.formats.archive import CheckpointFiles
from nemo_lmpo.formats.safe_metadata import read_metadata


class DistributedCheckpoint:
    """The tensors of a checkpoint that `torch.distributed.checkpoint` or megatron-core wrote.

    ``folder`` is where it lies among ``files`` (empty: at the top).

    Raises:
        CheckpointError: not such a checkpoint, damaged, or of a backend that is not supported.
    """

    def __init__(self, files: CheckpointFiles, folder: str = "") -> None:
        self.origin = f"{files.origin}/{folder}" if folder else files.origin
        self._check_backend(files, folder)
        name = f"{folder}/.metadata" if folder else ".metadata"
        with files.open(name) as stream:
            self._metadata = read_metadata(stream, f"{files.origin}: {name}")
        self._check_data_files(files, folder)
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._reader = FileSystemReader(folder)
        self._reader.fs = _ReadOnlyFiles(files)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def read(self, key: str, index: int | None = None) -> Tensor:
        """The tensor ``key``, or only its slice ``[index]`` along the first axis.

        Raises:
            CheckpointError: the data file is damaged or does not hold all of it.
        """
        entry = self.tensors[key]
        offsets, sizes = [0] * len(entry.size), list(entry.size)
        if index is not None:
            offsets[0], sizes[0] = index, 1
        out = torch.empty(sizes, dtype=entry.properties.dtype)
        chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
        planner = _IntoTensor(out)
        items = create_read_items_for_chunk_list(key, entry, [chunk])
        try:
            self._reader.read_data(LoadPlan(items), planner)
        # torch.load raises several kinds of errors on damaged data; all mean the same to the user.
        except Exception as error:
            raise CheckpointError(
                f"{self.origin}: {key} cannot be read ({type(error).__name__}: {error}); copy the checkpoint again"
            ) from None
        if planner.elements != out.numel():
            raise CheckpointError(
                f"{self.origin}: {key} is incomplete ({planner.elements} of {out.numel()} elements); "
                "copy the checkpoint again"
            )
        return out if index is None else out[0]

    def _check_backend(self, files: CheckpointFiles, folder: str) -> None:
        names = set(files.names())
        at = f"{folder}/" if folder else ""
        if f"{at}.metadata" in names:
            return
        if any(name.startswith(at) and name.endswith(".zarray") for name in names):
            raise CheckpointError(
                f"{self.origin} is a zarr checkpoint, which is not supported; save it as torch_dist with NeMo first"
            )
        backend = "an unknown"
        if f"{at}metadata.json" in names:
            with files.open(f"{at}metadata.json") as stream:
                backend = f"the '{json.load(stream).get('sharded_backend')}'"
        raise CheckpointError(
            f"{self.origin} has no .metadata file ({backend} backend); give a torch_dist distributed checkpoint"
        )

    def _check_data_files(self, files: CheckpointFiles, folder: str) -> None:
        names = set(files.names())
        needed = {info.relative_path for info in self._metadata.storage_data.values()}
        outside = sorted(str(name) for name in needed if PurePosixPath(name).name != name)
        if outside:
            raise CheckpointError(f"{self.origin}: .metadata names files outside it: {', '.join(outside)}")
        missing = sorted(name for name in needed if (f"{folder}/{name}" if folder else name) not in names)
        if missing:
            raise CheckpointError(
                f"{self.origin} lacks {len(missing)} data file(s): {', '.join(missing)}; copy the checkpoint again"
            )


class _ReadOnlyFiles(FileSystem):
    """Lets torch's reader open files that lie in an archive."""

    def __init__(self, files: CheckpointFiles) -> None:
        self._files = files

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[IO[bytes], None, None]:  # type: ignore[override]
        with self._files.open(PurePosixPath(path).as_posix()) as stream:
            yield stream


class _IntoTensor(LoadPlanner):
    """Receives the pieces of one tensor; the plan is made by the caller."""

    def __init__(self, out: Tensor) -> None:
        self._out = out
        self.elements = 0

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self._out
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(axis, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        self.elements += tensor.numel()

    def set_up_planner(self, *arguments: Any, **keywords: Any) -> None:
        raise NotImplementedError

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise NotImplementedError
