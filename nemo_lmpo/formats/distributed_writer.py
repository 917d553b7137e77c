"""Write megatron-core distributed checkpoints tensor by tensor, in one process and without a model.

The result has the keys, chunks and companion files that megatron-core's `dist_checkpointing.save` gives, so
any parallel layout loads it.
"""

from __future__ import annotations

import io
import json
import pickle
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from nemo_lmpo.config.architecture import Architecture
from nemo_lmpo.formats.mapping import Rule, TensorLayout, fill, megatron_shape, part_shapes, rules
from nemo_lmpo.formats.sinks import Sink
from nemo_lmpo.formats.source import TensorSource

Progress = Callable[[str], None]
"""Called with the name of every tensor that is done."""

_VOCABULARY_BLOCK_BYTES = 64 * 1024 * 1024

_LAYER_EXTRA_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Modules whose (empty) Transformer Engine state a loading model may ask for."""


@dataclass(frozen=True)
class _Chunk:
    """A piece of a stored tensor: its place, and what makes it."""

    key: str
    size: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    make: Callable[[], Tensor]


def write_distributed_checkpoint(
    sink: Sink,
    folder: str,
    source: TensorSource,
    architecture: Architecture,
    *,
    prefix: str,
    dtype: torch.dtype,
    progress: Progress = lambda name: None,
) -> None:
    """Write all tensors of ``source`` into ``folder`` of ``sink``, with ``prefix`` before the keys.

    One stored chunk (a layer's matrix, or a block of the vocabulary) is in memory at a time. Vocabulary padding is not
    stored: loading a padded model fills it with zeros.
    """
    chunks = list(_chunks(source, architecture, prefix, dtype, progress))
    objects = _extra_states(architecture, prefix)
    with warnings.catch_warnings():
        # torch remarks that there is no process group, which is the intent.
        warnings.simplefilter("ignore")
        _save(_SinkWriter(sink, folder), _Planner(chunks, objects, dtype))
    with sink.create(f"{folder}/common.pt") as stream:
        torch.save({}, stream)
    with sink.create(f"{folder}/metadata.json") as stream:
        stream.write(json.dumps(_BACKEND).encode())


def _save(writer: FileSystemWriter, planner: SavePlanner) -> None:
    try:
        dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    except dcp.CheckpointException as error:
        # torch wraps even an interruption; there is one process, so one cause.
        cause, _ = next(iter(error.failures.values()))
        raise cause from None


_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def _chunks(
    source: TensorSource, architecture: Architecture, prefix: str, dtype: torch.dtype, progress: Progress
) -> Iterator[_Chunk]:
    for rule in rules(architecture):
        shape = megatron_shape(rule, architecture)
        layers = architecture.num_layers if rule.per_layer else 1
        for layer in range(layers):
            lead, at = ((layers,), (layer,)) if rule.per_layer else ((), ())
            for piece in _pieces(rule, layer, architecture, dtype):
                yield _Chunk(
                    key=prefix + rule.megatron,
                    size=(*lead, *shape),
                    offsets=(*at, piece.row, *(0 for _ in shape[1:])),
                    sizes=(*(1 for _ in lead), *piece.shape),
                    make=_maker(source, architecture, rule, piece, dtype, progress),
                )


@dataclass(frozen=True)
class _Piece:
    """Rows of a parameter (of one layer) that are stored together, and the tensors they come from."""

    names: tuple[str, ...]
    row: int
    shape: tuple[int, ...]
    first: int | None = None
    """For a piece of one tensor: the first row to take from it."""
    ends_tensor: bool = True


def _pieces(rule: Rule, layer: int, architecture: Architecture, dtype: torch.dtype) -> Iterator[_Piece]:
    """Gate and up apart, as NeMo stores them; the vocabulary in blocks, which keeps memory small."""
    names = rule.hf_names(layer)
    if rule.layout is TensorLayout.GATE_UP:
        row = 0
        for name, shape in zip(names, part_shapes(rule, architecture), strict=True):
            yield _Piece((name,), row, shape, first=0)
            row += shape[0]
    elif rule.layout is TensorLayout.VOCABULARY:
        rows, columns = part_shapes(rule, architecture)[0]
        block = max(1, _VOCABULARY_BLOCK_BYTES // (columns * dtype.itemsize))
        for row in range(0, rows, block):
            taken = min(block, rows - row)
            yield _Piece(names, row, (taken, columns), first=row, ends_tensor=row + taken == rows)
    else:
        yield _Piece(names, 0, megatron_shape(rule, architecture))


def _maker(
    source: TensorSource,
    architecture: Architecture,
    rule: Rule,
    piece: _Piece,
    dtype: torch.dtype,
    progress: Progress,
) -> Callable[[], Tensor]:
    def make() -> Tensor:
        out = torch.empty(piece.shape, dtype=dtype)
        parts = [source.get(name) for name in piece.names]
        if piece.first is None:
            fill(out, rule, parts, architecture)
        else:
            out.copy_(parts[0][piece.first : piece.first + piece.shape[0]])
        if piece.ends_tensor:
            for name in piece.names:
                progress(name)
        return out.unsqueeze(0) if rule.per_layer else out

    return make


def _extra_states(architecture: Architecture, prefix: str) -> list[str]:
    layers = architecture.num_layers
    return [
        f"{prefix}decoder.layers.{module}._extra_state/shard_{layer}_{layers}"
        for layer in range(layers)
        for module in _LAYER_EXTRA_STATES
    ] + [f"{prefix}decoder.final_layernorm._extra_state/shard_0_1"]


class _Planner(SavePlanner):
    """Plans the chunks as they are given and makes each when it is written."""

    def __init__(self, chunks: list[_Chunk], objects: list[str], dtype: torch.dtype) -> None:
        self._chunks = {(chunk.key, chunk.offsets): chunk for chunk in chunks}
        self._objects = objects
        self._properties = TensorProperties(dtype=dtype)

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing to set up: the plan does not come from a state dict."""

    def create_local_plan(self) -> SavePlan:
        objects = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        return SavePlan(objects + [self._item(chunk) for chunk in self._chunks.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            # megatron-core keeps a list of the shards of an object; None is the state of a module without FP8.
            torch.save([None], stream)
            return stream
        assert write_item.index.offset is not None
        return self._chunks[write_item.index.fqn, tuple(write_item.index.offset)].make()

    def _item(self, chunk: _Chunk) -> WriteItem:
        offsets = torch.Size(chunk.offsets)
        return WriteItem(
            index=MetadataIndex(chunk.key, offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(chunk.sizes)),
                properties=self._properties,
                size=torch.Size(chunk.size),
            ),
        )


class _SinkFileSystem(FileSystem):
    """Sends the files that torch's writer creates to a sink."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[IO[bytes], None, None]:  # type: ignore[override]
        with self._sink.create(PurePosixPath(path).as_posix()) as stream:
            yield cast(IO[bytes], _KeptOpen(stream))

    def mkdir(self, path: Any) -> None:
        """Sinks make directories as files need them."""

    def exists(self, path: Any) -> bool:
        return False


class _KeptOpen(io.RawIOBase):
    """Leaves closing to the sink, which still has to finish the file."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._stream.tell()

    def write(self, data: Any) -> int:
        return self._stream.write(data)


class _SinkWriter(FileSystemWriter):
    """torch's writer, with a sink in place of the file system."""

    def __init__(self, sink: Sink, folder: str) -> None:
        # One thread, nothing copied ahead: a sink takes one file at a time, and memory stays at one chunk.
        super().__init__(folder, sync_files=False, thread_count=1, per_thread_copy_ahead=0)
        self.fs = _SinkFileSystem(sink)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write `.metadata` at once: renaming, which torch relies on, is not possible in an archive."""
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {result.index: result.storage_data for group in results for result in group}
        metadata.storage_meta = self.storage_meta()
        if metadata.storage_meta is not None:
            # The path of a temporary directory says nothing to those who read the checkpoint.
            metadata.storage_meta.checkpoint_id = None
        with self.fs.create_stream(PurePosixPath(self.path) / ".metadata", "wb") as stream:
            stream.write(pickle.dumps(metadata))
