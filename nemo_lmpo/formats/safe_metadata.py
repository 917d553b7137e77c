"""Read the `.metadata` of a torch distributed checkpoint without running anything that it holds.

The file is a pickle, and unpickling can run code. Here every class that it names is replaced by this module:
the plain records that describe tensors and files are allowed, everything that only planning needs becomes an
inert record, and any other name is refused.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import IO, Any

import torch
from torch.distributed.checkpoint import metadata as records
from torch.distributed.checkpoint.filesystem import _StorageInfo

from nemo_lmpo.errors import CheckpointError

_RECORDS = (
    "Metadata",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "TensorProperties",
    "ChunkStorageMetadata",
    "MetadataIndex",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
)
_DTYPES = ("float64", "float32", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool")


class _Inert:
    """Stands for an object whose content does not matter; accepts what unpickling does to it."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


_ALLOWED: dict[tuple[str, str], type | Callable[..., Any] | torch.dtype] = {
    **{("torch.distributed.checkpoint.metadata", name): getattr(records, name) for name in _RECORDS},
    **{("torch", name): getattr(torch, name) for name in _DTYPES},
    ("torch", "Size"): torch.Size,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch.serialization", "_get_layout"): lambda name: torch.strided,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): records.Metadata,
}
_INERT = {
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
    ("builtins", "getattr"),
}
_INERT_PACKAGES = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
"""Saving plans and the like, which some versions keep in the metadata."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if (module, name) in _INERT or module.startswith(_INERT_PACKAGES):
            return _Inert
        raise CheckpointError(f"it names {module}.{name}, which does not belong there and is not loaded")


def read_metadata(stream: IO[bytes], origin: str) -> records.Metadata:
    """The description of tensors and files in ``stream``; ``origin`` names it in errors.

    Raises:
        CheckpointError: damaged, or with content that checkpoint metadata does not have.
    """
    try:
        metadata = _MetadataUnpickler(stream).load()
    except CheckpointError as error:
        raise CheckpointError(f"{origin} is refused: {error}; do not use this checkpoint") from None
    # A damaged pickle can raise anything while it is being interpreted.
    except Exception as error:
        raise CheckpointError(
            f"{origin} is damaged or no checkpoint metadata ({type(error).__name__}: {error}); copy it again"
        ) from None
    if not _is_whole(metadata):
        raise CheckpointError(f"{origin} is not checkpoint metadata; copy the checkpoint again")
    whole: records.Metadata = metadata
    return whole


def _is_whole(metadata: Any) -> bool:
    """Whether every record has its fields; unpickling fills them with whatever the file says, or not at all."""
    try:
        return (
            isinstance(metadata, records.Metadata)
            and all(isinstance(key, str) and _is_entry(it) for key, it in metadata.state_dict_metadata.items())
            and all(_is_place(index, info) for index, info in metadata.storage_data.items())
        )
    except (AttributeError, TypeError):
        return False


def _is_entry(entry: Any) -> bool:
    if isinstance(entry, records.BytesStorageMetadata):
        return True
    return (
        isinstance(entry, records.TensorStorageMetadata)
        and isinstance(entry.properties.dtype, torch.dtype)
        and _are_sizes(entry.size)
        and all(
            _are_sizes(part) and len(part) == len(entry.size)
            for chunk in entry.chunks
            for part in (chunk.offsets, chunk.sizes)
        )
    )


def _are_sizes(sizes: Any) -> bool:
    return isinstance(sizes, torch.Size) and all(size >= 0 for size in sizes)


def _is_place(index: Any, info: Any) -> bool:
    return (
        isinstance(index, records.MetadataIndex)
        and isinstance(info, _StorageInfo)
        and isinstance(info.relative_path, str)
        and all(type(number) is int and number >= 0 for number in (info.offset, info.length))
        # Extensions such as compression; megatron-core uses none.
        and not getattr(info, "transform_descriptors", None)
    )
