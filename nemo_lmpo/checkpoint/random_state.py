"""Random states of a process, for exact resumption."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nemo_lmpo.formats.distributed_reader import read_object


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, torch and megatron-core's model-parallel generators.

    Weights and data order do not depend on these (they have seeds of their own).
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Everything that :func:`restore_random_state` needs, as tensors and plain values."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    numpy_state = dict(np.random.get_state(legacy=False))
    key = numpy_state["state"]["key"]
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": torch.from_numpy(key.astype(np.int64))}},
        "torch": torch.get_rng_state(),
        "tracker": dict(get_cuda_rng_tracker().get_states()),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put a saved state back.

    What belongs to the device is left alone if the run moved from CPUs to GPUs or back: the generators differ.
    """
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    random.setstate(state["python"])
    key = state["numpy"]["state"]["key"]
    key = key.numpy() if isinstance(key, torch.Tensor) else key
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key.astype(np.uint32)}})
    torch.set_rng_state(state["torch"])
    if ("cuda" in state) != torch.cuda.is_initialized():
        return
    get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def sharded_random_state() -> Any:
    """This rank's state as one object of a distributed checkpoint that has an object per rank."""
    return _sharded_object(random_state())


def _sharded_object(data: Any) -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return ShardedObject("random_state", data, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)


def read_random_state(state: Path) -> dict[str, Any]:
    """This rank's state in the checkpoint whose tensors lie in ``state``; it had as many ranks.

    Raises:
        CheckpointError: there is none, or it holds what does not belong there.
        OSError: it cannot be read.
    """
    found: dict[str, Any] = read_object(state, _sharded_object(None).unique_key)[0]
    return found
