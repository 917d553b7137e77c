"""What all ranks do together about files that one of them touches, and what went wrong there."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from nemo_lmpo.errors import TrainingError, UserError, first_line
from nemo_lmpo.runtime.peers import raised_by_rank


def on_main_rank(action: Callable[[], Any]) -> Any:
    """Run ``action`` on rank 0 and give every rank its result, or raise its user error on every rank.

    Communicates: one object broadcast over all ranks. A rank that failed alone would leave the others waiting.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (UserError, TrainingError, OSError) as error:
            outcome[1] = error
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def from_all_ranks(value: Any) -> list[Any]:
    """Every rank's ``value``, by rank. Communicates: one object all-gather over all ranks."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def storage_errors() -> tuple[type[BaseException], ...]:
    """What megatron-core and torch raise where reading or writing a distributed checkpoint fails.

    The same kinds come from a full GPU or a lost rank: they tell nothing about the files.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException  # wraps what a rank raised; no Exception

    return OSError, RuntimeError, EOFError, ValueError, KeyError, CheckpointingException, CheckpointException


def reason_of(error: BaseException) -> str:
    """One line; what a rank raised stands last in what torch made of it."""
    found = raised_by_rank(error)
    if found is None:
        return first_line(error)
    where = f"rank {found[0]}: " if dist.is_initialized() and dist.get_world_size() > 1 else ""
    return where + first_line(found[1])


def disk_is_full(error: BaseException) -> bool:
    """Whether a write failed for want of room; torch tells it in the text of its errors only."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    text = str(error)
    return any(part in text for part in ("No space left on device", "Disk quota exceeded", "unexpected pos"))
