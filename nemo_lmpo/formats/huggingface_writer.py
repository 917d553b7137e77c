"""Write Hugging Face weights: safetensors files and the index over them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.formats.huggingface import INDEX_FILE
from nemo_lmpo.formats.source import TensorSource, get_fitting

MAX_SHARD_BYTES = 5_000_000_000
"""Files grow to at most this size, unless one tensor is larger (as transformers does by default)."""


def write_safetensors(
    directory: Path,
    source: TensorSource,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Write all tensors of ``source`` in ``dtype``; the tensors of one file are in memory at a time.

    Raises:
        CheckpointError: a file cannot be written, for example because the disk is full; or a number of the source that
            ``dtype`` does not hold.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    sizes = {name: torch.empty(source.shape(name), dtype=dtype, device="meta") for name in source.names()}
    shards = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_bytes)
    for file, names in shards.filename_to_tensors.items():
        tensors = {}
        for name in names:
            tensors[name] = _on_its_own(get_fitting(source, name, dtype).to(dtype))
            progress(name)
        _save(directory / file, tensors)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": dict(sorted(shards.tensor_to_filename.items()))}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _on_its_own(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, and without others in its storage, which safetensors would take for tied weights."""
    shares = tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone(memory_format=torch.contiguous_format) if shares else tensor.contiguous()


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be written ({error}); free some space or choose another disk") from None
    mask = os.umask(0)
    os.umask(mask)
    # safetensors makes files that only their owner can read.
    path.chmod(0o666 & ~mask)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
