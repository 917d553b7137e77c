"""Write megatron-core distributed checkpoints tensor by tensor, in one process and without a model.

The result has the keys, chunks and companion files that megatron-core's `dist_checkpointing.save` gives, so
any parallel layout loads it. torch's own writer plans over whole tensors in memory; here one chunk exists at a time.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterator

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_lmpo.formats.architecture import Architecture
from nemo_lmpo.formats.distributed_reader import CHECKSUM, CHECKSUMS_FILE
from nemo_lmpo.formats.mapping import (
    EXPERTS,
    Place,
    Rule,
    TensorLayout,
    fill,
    megatron_shape,
    part_shapes,
    rules_by_place,
    stacked,
)
from nemo_lmpo.formats.sinks import Sink
from nemo_lmpo.formats.source import TensorSource, get_fitting
from nemo_lmpo.formats.steady_file import SteadyFile
from nemo_lmpo.formats.torch_archive import save_into
from nemo_lmpo.runtime.threads import one_ahead

Progress = Callable[[str], None]
"""Called with the name of every tensor that is done."""

_DATA_FILE = "__0_0.distcp"
_VOCABULARY_BLOCK_BYTES = 64 * 1024 * 1024
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


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

    Two stored chunks (a layer's matrix, or a block of the vocabulary) are in memory at a time: one is read while the
    other is written.
    Vocabulary padding is not stored: loading a padded model fills it with zeros. Each chunk's checksum is kept in a
    file that only this project reads.

    Raises:
        CheckpointError: a number of the source is not finite, or ``dtype`` does not hold it.
    """
    with sink.open(f"{folder}/{_DATA_FILE}") as file:
        catalog = _Catalog(TensorProperties(dtype=dtype), file)
        for key in _extra_states(architecture, prefix):
            catalog.add_object(key)
        for rule, place, (row, tensor, done) in one_ahead(_pieces(source, architecture, dtype), "reader"):
            size, lead = megatron_shape(rule, architecture), stacked(rule, architecture)
            offsets = (*rule.index(place), row, *(0 for _ in size[1:]))
            catalog.add_chunk(prefix + rule.megatron, (*lead, *size), offsets, tensor)
            for name in done:
                progress(name)
    metadata = pickle.dumps(catalog.metadata)
    common = io.BytesIO()
    torch.save({}, common)
    sink.add(f"{folder}/.metadata", metadata)
    sink.add(f"{folder}/common.pt", common.getvalue())
    sink.add(f"{folder}/metadata.json", json.dumps(_BACKEND).encode())
    checksums = {
        "algorithm": CHECKSUM,
        "metadata": xxhash.xxh3_64_hexdigest(metadata),
        "chunks": {_DATA_FILE: catalog.checksums},
    }
    sink.add(f"{folder}/{CHECKSUMS_FILE}", json.dumps(checksums).encode())


class _Catalog:
    """What lies where in the data file."""

    def __init__(self, properties: TensorProperties, file: SteadyFile) -> None:
        self._properties = properties
        self._file = file
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._end = 0
        self.metadata = Metadata({}, storage_data=self._storage, version=CURRENT_DCP_VERSION)
        self.checksums: dict[int, str] = {}

    def add_object(self, key: str) -> None:
        """Write an object's place; megatron-core keeps a list of its shards, None in a module without FP8."""
        self.metadata.state_dict_metadata[key] = BytesStorageMetadata()
        self._write(MetadataIndex(key), [None])

    def add_chunk(self, key: str, size: tuple[int, ...], offsets: tuple[int, ...], tensor: Tensor) -> None:
        """Write a piece, at ``offsets`` of the tensor ``key`` of ``size``; ``tensor`` may lack leading ones."""
        entry = self.metadata.state_dict_metadata.setdefault(
            key, TensorStorageMetadata(self._properties, torch.Size(size), [])
        )
        assert isinstance(entry, TensorStorageMetadata)
        tensor = tensor.reshape(*(1 for _ in range(len(size) - tensor.dim())), *tensor.shape)
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), tensor.shape))
        self._write(MetadataIndex(key, torch.Size(offsets), len(entry.chunks) - 1), tensor)

    def _write(self, index: MetadataIndex, value: object) -> None:
        digest, size = xxhash.xxh3_64(), 0

        def take(block: memoryview) -> None:
            nonlocal size
            digest.update(block)
            size += self._file.write(block)

        save_into(take, value)
        self._storage[index] = _StorageInfo(_DATA_FILE, self._end, size)
        self.checksums[self._end] = digest.hexdigest()
        self._end += size


def _pieces(
    source: TensorSource, architecture: Architecture, dtype: torch.dtype
) -> Iterator[tuple[Rule, Place, tuple[int, Tensor, tuple[str, ...]]]]:
    """Everything that is stored, in its order."""
    for rule, place in rules_by_place(architecture):
        for piece in _pieces_of(rule, place, source, architecture, dtype):
            yield rule, place, piece


def _pieces_of(
    rule: Rule, at: Place, source: TensorSource, architecture: Architecture, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor, tuple[str, ...]]]:
    """What is stored together of a parameter at a place: its first row, its content, and the tensors done by it.

    Gate and up apart, as NeMo stores them; the vocabulary in blocks, which keeps memory small.
    """
    names = rule.hf_names(at)
    if rule.layout is TensorLayout.GATE_UP:
        for place, name in enumerate(names):
            yield place * architecture.mlp_size, _copied(get_fitting(source, name, dtype), dtype), (name,)
    elif rule.layout is TensorLayout.VOCABULARY:
        rows, columns = part_shapes(rule, architecture)[0]
        block = max(1, _VOCABULARY_BLOCK_BYTES // (columns * dtype.itemsize))
        for row in range(0, rows, block):
            whole = get_fitting(source, names[0], dtype) if row == 0 else source.get(names[0])  # looked at once
            content = _copied(whole[row : row + block], dtype)
            yield row, content, names if row + block >= rows else ()
    else:
        out = torch.empty(megatron_shape(rule, architecture), dtype=dtype)
        fill(out, rule, [get_fitting(source, name, dtype) for name in names], architecture)
        yield 0, out, names


def _copied(part: Tensor, dtype: torch.dtype) -> Tensor:
    """In a storage of its own, as torch saves storages whole."""
    return part.to(dtype, copy=True, memory_format=torch.contiguous_format)


_EXTRA_STATES = ("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention")
"""Modules whose (empty) Transformer Engine state a loading model may ask for."""
_LINEARS = ("linear_fc1", "linear_fc2")
"""Of the MLP, or of each expert."""


def _extra_states(architecture: Architecture, prefix: str) -> list[str]:
    layers = architecture.num_layers
    norms = ("self_attention.q_layernorm", "self_attention.k_layernorm") if architecture.family.qk_norm else ()
    modules = (*_EXTRA_STATES, *norms, *(f"mlp.{name}" for name in _LINEARS if architecture.experts is None))
    experts = 0 if architecture.experts is None else architecture.experts.number
    return [
        *(
            f"{prefix}decoder.layers.{module}._extra_state/shard_{layer}_{layers}"
            for layer in range(layers)
            for module in modules
        ),
        *(
            f"{prefix}decoder.layers.{EXPERTS}{name}._extra_state/shard_{layer}.{expert}_{layers}.{experts}"
            for layer in range(layers)
            for expert in range(experts)
            for name in _LINEARS
        ),
        f"{prefix}decoder.final_layernorm._extra_state/shard_0_1",
    ]
