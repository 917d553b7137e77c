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

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _strided(name: str) -> torch.layout:
    return torch.strided


_ALLOWED: dict[tuple[str, str], type | Callable[..., Any] | torch.dtype] = {
    **{("torch.distributed.checkpoint.metadata", name): getattr(records, name) for name in _RECORDS},
    **{("torch", name): getattr(torch, name) for name in _DTYPES},
    ("torch", "Size"): torch.Size,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch.serialization", "_get_layout"): _strided,
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
    if not isinstance(metadata, records.Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{origin} is no checkpoint metadata; copy the checkpoint again")
    return metadata
