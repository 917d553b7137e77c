"""What core attention needs to know of a micro-batch, worked out once and used by every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nemo_lmpo.parallel.context import local_positions


@dataclass(frozen=True)
class AttentionPlan:
    """One variable-length attention call for all spans of a micro-batch.

    The keys of a span are its prefix's followed by its own, so a prompt's keys are wanted up to three times: by the
    prompt and in front of each response. ``keys`` lays the keys of all spans behind each other; queries stand in
    that order already. A causal mask aligned at the last key of each span does the rest.
    """

    query_lengths: tuple[int, ...]
    """Queries of each span, on the host."""
    key_lengths: tuple[int, ...]
    """Keys of each span, on the host."""
    query_offsets: Tensor
    """``[N + 1]`` int32: where each span's queries begin."""
    key_offsets: Tensor
    """``[N + 1]`` int32: where each span's keys begin."""
    keys: Tensor | None
    """``[M]`` int64: which token's key stands there, counted in the order in which the context-parallel ranks hold
    the tokens, one rank behind the other; None where all keys stand as they are."""
    key_uses: Tensor | None
    """``[T, U]`` int64: for each token the places in ``keys`` that hold it, filled up with 0; for backward."""
    key_unused: Tensor | None
    """``[T * U]`` bool: which entries of ``key_uses`` only fill up."""

    @property
    def longest_query(self) -> int:
        """Queries of the longest span."""
        return max(self.query_lengths)

    @property
    def longest_key(self) -> int:
        """Keys of the longest span."""
        return max(self.key_lengths)

    def map(self, move: Callable[[Tensor], Tensor]) -> AttentionPlan:
        """The plan with every tensor replaced by ``move(tensor)``."""
        tensors: dict[str, Any] = {n: move(v) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


def plan_attention(spans: Tensor, num_tokens: int, *, cp_size: int) -> AttentionPlan:
    """Work out the plan of a rank's spans, on the host.

    Args:
        spans: ``[N, 6]`` int32 on the CPU (see :func:`nemo_lmpo.parallel.context.attention_spans`); together they
            hold every query of the rank.
        num_tokens: tokens of the whole sequence, ``T``.
        cp_size: size of the context-parallel group.

    Raises:
        ValueError: queries are in no span.
    """
    spans = spans.long()
    lengths = spans[:, 1]
    ends = lengths.cumsum(0)
    if not torch.equal(spans[:, 0], ends - lengths) or int(lengths.sum()) != num_tokens // cp_size:
        raise ValueError("attention spans do not cover the queries one behind the other; lay padding as a span too")
    key_lengths = spans[:, 3] + spans[:, 5]
    runs = spans[:, 2:].reshape(-1, 2)  # prefix and own of each span in turn: start, length
    keys = _concatenated_ranges(runs[:, 0], runs[:, 1])
    if cp_size == 1 and torch.equal(keys, torch.arange(num_tokens)):
        uses = unused = order = None
    else:
        order = held_order(num_tokens, cp_size=cp_size)[keys]
        uses, unused = _uses(order, num_tokens)
    return AttentionPlan(
        query_lengths=tuple(lengths.tolist()),
        key_lengths=tuple(key_lengths.tolist()),
        query_offsets=_offsets(lengths),
        key_offsets=_offsets(key_lengths),
        keys=order,
        key_uses=uses,
        key_unused=unused,
    )


def held_order(num_tokens: int, *, cp_size: int) -> Tensor:
    """``[T]`` int64: where each token stands when the parts of all ranks are laid behind each other."""
    held = torch.cat([local_positions(num_tokens, cp_rank=rank, cp_size=cp_size) for rank in range(cp_size)])
    return held.argsort()


def _concatenated_ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """``start, start + 1, ... start + length - 1`` of every run, one behind the other."""
    begins = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts - begins, lengths)


def _uses(keys: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The inverse of ``keys``: each token's places in it, and which entries are none."""
    counts = torch.bincount(keys, minlength=num_tokens)
    places = keys.argsort(stable=True)
    # Which use of its token each place is: its rank among the equal keys before it.
    use = torch.arange(keys.numel()) - (counts.cumsum(0) - counts)[keys[places]]
    uses = torch.zeros(num_tokens, int(counts.max()), dtype=torch.int64)
    uses[keys[places], use] = places
    unused = torch.arange(uses.shape[1]) >= counts[:, None]
    return uses, unused.flatten()


def _offsets(lengths: Tensor) -> Tensor:
    """``[N + 1]`` int32 offsets, as the kernels want them."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
