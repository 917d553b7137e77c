"""A safetensors file, written tensor by tensor: the bytes are those that the package safetensors writes at once.

The format is the size of a header, the header as JSON with each tensor's place, and the tensors' bytes in its order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
import xxhash
from torch import Tensor

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.formats.steady_file import SteadyFile
from nemo_lmpo.runtime.threads import one_ahead

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_BLOCK = 2**20
"""Bytes that are summed and then written: they are in the processor's cache for the second."""


def write_tensors(
    path: Path,
    sizes: Mapping[str, Tensor],
    tensors: Iterator[tuple[str, Tensor]],
    progress: Callable[[str], None] = lambda name: None,
) -> str:
    """Write ``tensors`` in the order of their names; the next one is made while one is written.

    Args:
        path: the new file.
        sizes: a tensor of the same shape and dtype for each, for example on the meta device; all of one dtype.
        tensors: names and tensors on the CPU, sorted by name.
        progress: called with the name of every tensor that is done.

    Returns:
        The file's checksum, as :func:`~nemo_lmpo.runtime.files.file_checksum` gives it.

    Raises:
        CheckpointError: the file cannot be written, for example because the disk is full.
    """
    digest = xxhash.xxh3_128()
    with _named(path):
        file = SteadyFile(path)

    def write(content: memoryview) -> None:
        for start in range(0, len(content), _BLOCK):
            block = content[start : start + _BLOCK]
            digest.update(block)
            with _named(path):
                file.write(block)

    with file:
        write(memoryview(_header(sizes)))
        for name, tensor in one_ahead(tensors, "reader"):
            write(_content(tensor))
            progress(name)
        with _named(path):
            file.finish()
    return digest.hexdigest()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of writing name the file; those of where tensors come from are left to it."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error}); free some space or choose another disk") from None


def _header(sizes: Mapping[str, Tensor]) -> bytes:
    places: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(sizes):
        size = sizes[name]
        begin, end = end, end + size.nbytes
        places[name] = {"dtype": _NAMES[size.dtype], "shape": list(size.shape), "data_offsets": [begin, end]}
    text = json.dumps(places, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _content(tensor: Tensor) -> memoryview:
    return memoryview(cast("bytes", tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))  # an array is a buffer
