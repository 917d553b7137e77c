"""Random states of a process, for exact resumption."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


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
    """Everything that :func:`restore_random_state` needs."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put a saved state back."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


def sharded_random_state() -> Any:
    """This rank's state as one object of a distributed checkpoint that has an object a rank."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return ShardedObject("random_state", random_state(), (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)
