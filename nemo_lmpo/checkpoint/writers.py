"""megatron-core's checkpoint writers, made to end with the run and to say what they wrote."""

from __future__ import annotations

import inspect
import io
import os
import pickle
import queue
import tempfile
from pathlib import Path
from typing import IO, Any

from nemo_lmpo.checkpoint.agreement import on_main_rank
from nemo_lmpo.runtime import run_files

WORTH_TWO_WRITERS = 2**28
"""Bytes of a rank's share; of less, half is written before another copy of the process has been made."""


class WriteResults:
    """What forked writers found, in memory that they share with this process.

    megatron-core's own queue is a server process, which imports torch and megatron-core to hold such values (two
    seconds and 200 MiB per rank), and outlives a killed run.
    """

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            self._file: IO[bytes] = os.fdopen(os.memfd_create("write_results"), "w+b")
        else:  # not Linux: a file without a name
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open for as long as this
        self._taken = 0

    def put(self, value: object) -> None:
        """Leave a value, in this process or in a fork of it; one at a time."""
        with os.fdopen(os.dup(self._file.fileno()), "ab") as file:
            pickle.dump(value, file)

    def get_nowait(self) -> object:
        """The next value.

        Raises:
            queue.Empty: there is none, or its writer died in the middle of it.
        """
        # Writers move the file's position, which is shared, too.
        number = self._file.fileno()
        rest = io.BytesIO(os.pread(number, os.fstat(number).st_size - self._taken, self._taken))
        try:
            value: object = pickle.load(rest)  # noqa: S301 - of our own forks
        except (EOFError, pickle.UnpicklingError):
            raise queue.Empty from None
        self._taken += rest.tell()
        if not rest.read(1):  # one save's results need not lie there until the last
            os.ftruncate(number, 0)
            self._taken = 0
        return value


def collect_write_results() -> None:
    """Give megatron-core's writers of this process the place in which they report."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if not isinstance(getattr(filesystem_async, "_results_queue", None), WriteResults):
        filesystem_async._results_queue = WriteResults()


def write_state(state: dict[str, Any], directory: Path, *, in_background: bool) -> Any:
    """Write a sharded state dict; with ``in_background`` only the request to do so, for a queue of calls.

    Communicates over all ranks.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    collect_write_results()
    save = dist_checkpointing.save
    # Newer versions would take the writers of nvidia-resiliency-ext, which pip does not bring along.
    own_writers = {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(save).parameters else {}
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=_writers(state))
    request = save(state, str(directory), sharded_strategy=strategy, async_sharded_save=in_background, **own_writers)
    on_main_rank(lambda: _write_common(state, directory / run_files.COMMON))
    return request


def _writers(state: dict[str, Any]) -> int:
    """Processes that this rank forks to write its share, each a file: megatron-core's two where it takes a while."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    tensors = (getattr(value, "data", None) for value in nested_values(state))
    return 1 if sum(getattr(tensor, "nbytes", 0) for tensor in tensors) < WORTH_TWO_WRITERS else 2


def _write_common(state: dict[str, Any], file: Path) -> None:
    """Write what belongs to no rank, plain values beside the sharded ones, where megatron-core did not.

    From 0.19 on it puts them among the tensors only. In a file of their own as well, every version reads them, and a
    checkpoint's step can be compared without megatron-core.
    """
    if file.exists():
        return
    import torch
    from megatron.core.dist_checkpointing.utils import extract_nonpersistent, extract_sharded_base

    _, persistent = extract_nonpersistent(state)
    _, common = extract_sharded_base(persistent)
    torch.save(common, file)
