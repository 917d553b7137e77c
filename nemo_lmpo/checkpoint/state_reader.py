"""Reading a checkpoint's state without unpickling anything freely.

megatron-core and torch unpickle a checkpoint's `.metadata` and every object in it, which can run code that someone put
there. Here metadata goes through the allow-list of :mod:`nemo_lmpo.formats.safe_metadata`, and objects through torch's
own ("weights only"). Tensors and `common.pt` are read so by torch itself.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.formats.safe_metadata import read_metadata

METADATA = ".metadata"


class SafeReader(FileSystemReader):
    """torch's reader, but for metadata."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the state holds and where.

        Raises:
            CheckpointError: damaged, or with content that does not belong there.
        """
        return state_metadata(Path(self.path))


def state_metadata(state: Path) -> Metadata:
    """The description of a state's tensors, objects and files.

    Raises:
        CheckpointError: damaged, or with content that does not belong there.
        OSError: it cannot be read.
    """
    with (state / METADATA).open("rb") as stream:
        return read_metadata(stream, str(state / METADATA))


@contextmanager
def reading_safely() -> Iterator[None]:
    """Within the block, megatron-core loads checkpoints through :class:`SafeReader`."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import torch as strategy

    name = "_get_filesystem_reader"
    with ExitStack() as undo:
        for module in (strategy, serialization):
            if hasattr(module, name):  # from 0.19 on, what is no tensor is read by a reference of its own
                undo.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, lambda directory, *args, **kwargs: SafeReader(directory))
        yield


def _numpy_names() -> list[Any]:
    """What checkpoints of version 1 need for NumPy's random state."""
    multiarray = getattr(np, "_core", None) or np.core  # NumPy 1 has the latter
    return [multiarray.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]


def read_object(state: Path, key: str) -> Any:
    """An object of the state that is no tensor, as megatron-core keeps it: a list of what was saved under ``key``.

    Raises:
        CheckpointError: there is none, or it holds what does not belong there.
        OSError: the file cannot be read.
    """
    places = [place for index, place in state_metadata(state).storage_data.items() if index.fqn == key]
    if len(places) != 1:
        raise CheckpointError(f"{state} holds no {key}; copy the checkpoint again, or resume from an older one")
    with (state / places[0].relative_path).open("rb") as file:
        file.seek(places[0].offset)
        content = file.read(places[0].length)
    with torch.serialization.safe_globals(_numpy_names()):
        return torch.load(io.BytesIO(content), weights_only=True)
