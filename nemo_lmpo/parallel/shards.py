"""A rank's part of a parameter that data-parallel ranks share (FSDP): rows of the whole, the first rank's come first.

torch keeps such a parameter as a `DTensor`, whose shape is that of the whole. Everything that reads or writes
parameters outside of a step does so through here; of other parameters a rank's part is the whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class OwnPart:
    """This rank's elements of a parameter, which lie in one piece of it."""

    local: Tensor
    """``[rows, ...]``: the parameter's own memory; without rows where there are fewer than ranks."""
    start: int
    """Where it begins in the flattened parameter."""


def is_shared(parameter: Tensor) -> bool:
    """Whether this rank keeps a part of the parameter only."""
    return isinstance(parameter, DTensor)


def mark_shared(parameter: Tensor, dtype: torch.dtype) -> None:
    """Note the dtype that a shared parameter is gathered in; its own is that of the optimizer."""
    assert is_shared(parameter)
    parameter.gathered_dtype = dtype  # type: ignore[attr-defined]


def gathered_dtype(parameter: Tensor) -> torch.dtype:
    """What forward sees, and what a checkpoint holds of the weights."""
    dtype: torch.dtype = getattr(parameter, "gathered_dtype", parameter.dtype)
    return dtype


def own_part(parameter: Tensor) -> OwnPart:
    """What this rank holds of a parameter, or of a tensor that lies as one does (a gradient, a moment).

    Nothing is communicated. torch cuts the rows into as many equal runs as there are ranks; the last ones may be
    shorter, or empty.
    """
    if not isinstance(parameter, DTensor):
        return OwnPart(parameter.detach(), 0)
    local = cast(DTensor, parameter.detach()).to_local()
    ranks, rank = parameter.device_mesh.size(), parameter.device_mesh.get_local_rank()
    rows = -(-parameter.shape[0] // ranks)
    first = min(rank * rows, parameter.shape[0])
    expected = (min(rows, parameter.shape[0] - first), *parameter.shape[1:])
    assert tuple(local.shape) == expected, f"{tuple(local.shape)} is not {expected}"
    return OwnPart(local, first * math.prod(parameter.shape[1:]))


@torch.no_grad()
def take_part(parameter: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of ``whole``, which has the parameter's shape, into the parameter."""
    part = own_part(parameter)
    flat = whole.reshape(-1)[part.start : part.start + part.local.numel()]
    part.local.copy_(flat.view(part.local.shape))
