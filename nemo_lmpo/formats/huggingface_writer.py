"""Write Hugging Face weights: safetensors files, tensor by tensor, and the index over them."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from typing import IO

import torch

from nemo_lmpo.formats.huggingface import DTYPES, INDEX_FILE, SINGLE_FILE
from nemo_lmpo.formats.sinks import Sink
from nemo_lmpo.formats.source import TensorSource

MAX_SHARD_BYTES = 5_000_000_000
"""Files grow to at most this size, unless one tensor is larger (as transformers does by default)."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BLOCK_ELEMENTS = 16 * 1024 * 1024


def write_safetensors(
    sink: Sink,
    source: TensorSource,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Write all tensors of ``source`` in ``dtype``; one tensor is in memory at a time."""
    shards = _shards(source, dtype, max_shard_bytes)
    if len(shards) == 1:
        files = [SINGLE_FILE]
    else:
        files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        with sink.create(file) as stream:
            _write_file(stream, names, source, dtype, progress)
    if len(shards) > 1:
        total = sum(_bytes(source, name, dtype) for name in source.names())
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        with sink.create(INDEX_FILE) as stream:
            stream.write((json.dumps(index, indent=2) + "\n").encode())


def _bytes(source: TensorSource, name: str, dtype: torch.dtype) -> int:
    return math.prod(source.shape(name)) * dtype.itemsize


def _shards(source: TensorSource, dtype: torch.dtype, max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name in source.names():
        size = _bytes(source, name, dtype)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_file(
    stream: IO[bytes], names: list[str], source: TensorSource, dtype: torch.dtype, progress: Callable[[str], None]
) -> None:
    # safetensors' own writer takes all tensors of a file at once, which would hold a whole file in memory.
    stream.write(_header(names, source, dtype))
    for name in names:
        for block in _blocks(source.get(name), dtype):
            stream.write(block)
        progress(name)


def _header(names: list[str], source: TensorSource, dtype: torch.dtype) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        end = start + _bytes(source, name, dtype)
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(source.shape(name)), "data_offsets": [start, end]}
        start = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header


def _blocks(tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """The little-endian bytes of the tensor in pieces, so that a cast never doubles a large one."""
    flat = tensor.contiguous().view(-1)
    for start in range(0, flat.numel(), _BLOCK_ELEMENTS):
        block = flat[start : start + _BLOCK_ELEMENTS].to(dtype)
        yield block.view(torch.uint8).numpy().data
