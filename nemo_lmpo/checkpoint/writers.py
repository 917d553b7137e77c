"""megatron-core's checkpoint writers, made to end with the run and to say what they wrote."""

from __future__ import annotations

import inspect
import queue
from pathlib import Path
from typing import Any

from nemo_lmpo.checkpoint.agreement import on_main_rank
from nemo_lmpo.runtime import run_files
from nemo_lmpo.runtime.children import following_queue

WORTH_TWO_WRITERS = 2**28
"""Bytes of a rank's share; of less, half is written before another copy of the process has been made."""


def serve_write_results(*, in_background: bool) -> None:
    """Give megatron-core's writers the queue in which they report.

    Its own is a server process, which imports everything again and outlives a killed run. A synchronous save needs
    none, as this process itself puts and gets; for an asynchronous one the server ends with this process.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    present = getattr(filesystem_async, "_results_queue", None)
    if in_background and (present is None or isinstance(present, queue.Queue)):
        filesystem_async._results_queue = following_queue()
    elif present is None:
        filesystem_async._results_queue = queue.Queue()


def write_state(state: dict[str, Any], directory: Path, *, in_background: bool) -> Any:
    """Write a sharded state dict; with ``in_background`` only the request to do so, for a queue of calls.

    Communicates over all ranks.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    serve_write_results(in_background=in_background)
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
    """Write what is no rank's own, plain values beside the sharded ones, where megatron-core did not.

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
