"""Whether a state that is saved, or was loaded, is finite: NaN must not become the newest checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_lmpo.checkpoint.agreement import from_all_ranks

_MOST_NAMED = 3


def find_not_finite(state: dict[str, Any], statistics: Mapping[str, Any] | None) -> str | None:
    """Which tensors of a sharded state, or margin statistics, are not finite on any rank; None: all are finite.

    Reads each tensor once, where it is, and waits for the device once. Communicates: one all-reduce of a number over
    all ranks (the default group, as any rank may hold any part of the state), and only where something is not finite
    an object all-gather over them. All ranks come to the same.

    Args:
        state: megatron-core's sharded state dict before saving, or after loading.
        statistics: state of the margin statistics.
    """
    named = [(name, tensor) for name, tensor in _tensors(state) if tensor.is_floating_point() and tensor.numel()]
    bounds = torch.stack([_bounds(tensor) for _, tensor in named])
    broken = bounds.isfinite().all().logical_not().to(torch.int32)
    if not all(math.isfinite(value) for value in (statistics or {}).values() if isinstance(value, int | float)):
        broken.fill_(1)
    if dist.get_world_size() > 1:
        dist.all_reduce(broken, op=dist.ReduceOp.MAX)
    if not broken.item():
        return None
    own = [name for (name, _), good in zip(named, bounds.isfinite().all(dim=1).tolist(), strict=True) if not good]
    return _told(from_all_ranks((own, len(named))))


def _bounds(tensor: Tensor) -> Tensor:
    """Smallest and largest value, ``[2]`` float32; NaN where there is one."""
    return torch.stack(tensor.detach().aminmax()).float()


def _tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of a sharded state dict by their keys; of a loaded one by their places."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from _tensors(value, str(key))
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value, name)
    elif isinstance(state, Tensor):
        yield name, state
    elif isinstance(data := getattr(state, "data", None), Tensor):
        yield str(state.key), data


def _told(by_rank: list[tuple[list[str], int]]) -> str:
    found = []
    for rank, (names, count) in enumerate(by_rank):
        if names:
            where = f" on rank {rank}" if len(by_rank) > 1 else ""
            more = ", ..." if len(names) > _MOST_NAMED else ""
            found.append(f"{', '.join(names[:_MOST_NAMED])}{more} ({len(names)} of {count} tensors{where})")
    if not found:
        return "the margin statistics"
    return "; ".join(found[:_MOST_NAMED]) + (" and on more ranks" if len(found) > _MOST_NAMED else "")
