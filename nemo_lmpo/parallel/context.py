"""Context parallelism: how a packed row is split over ranks.

A row of ``T`` tokens is cut into ``2 * cp`` equal chunks; rank ``r`` holds chunks ``r`` and ``2 * cp - 1 - r``.
Under causal attention the first chunks are cheap and the last dear, so every rank gets about the same work.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

SPAN_COLUMNS = 6
"""Columns of an attention span: query start (in the rank's part), query length, prefix start, prefix length,
own start, own length (keys, in the whole row)."""


def local_positions(num_tokens: int, *, cp_rank: int, cp_size: int) -> Tensor:
    """Indices in the row that a rank holds, ``[T / cp]`` int64, in the order in which it holds them."""
    if num_tokens % (2 * cp_size) and cp_size > 1:
        raise ValueError(f"a row of {num_tokens} tokens does not divide into 2 x {cp_size} chunks; pad it")
    if cp_size == 1:
        return torch.arange(num_tokens)
    chunks = torch.arange(num_tokens).view(2 * cp_size, -1)
    return torch.cat((chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]))


def attention_spans(segments: Tensor, num_tokens: int, *, cp_rank: int, cp_size: int) -> Tensor:
    """The rank's part of every segment as runs of queries with the keys that they see.

    Args:
        segments: ``[S, 4]`` int32 on the CPU (see :class:`nemo_lmpo.data.example.PackedSequence`).
        num_tokens: tokens of the whole row.
        cp_rank: rank in the context-parallel group.
        cp_size: its size.

    Returns:
        ``[N, 6]`` int32 on the CPU. Query ``i`` of a span sees the whole prefix and the own keys up to
        ``own length - query length + i``: a causal mask aligned at the bottom right.
    """
    chunk = num_tokens // (2 * cp_size) if cp_size > 1 else num_tokens
    held = (cp_rank, 2 * cp_size - 1 - cp_rank) if cp_size > 1 else (0,)
    spans: list[tuple[int, ...]] = []
    for start, length, prefix_start, prefix_length in segments.tolist():
        for place, index in enumerate(held):
            first = max(start, index * chunk)
            last = min(start + length, (index + 1) * chunk)
            if first < last:
                query_start = place * chunk + first - index * chunk
                spans.append((query_start, last - first, prefix_start, prefix_length, start, last - start))
    # In query order, so that attention can lay its outputs behind each other.
    return torch.tensor(sorted(spans), dtype=torch.int32).reshape(-1, SPAN_COLUMNS)


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, partial: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = partial.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        # Each rank computes the same loss from the total; its own part enters with weight one.
        return gradients[0], None


def sum_over_group(partial: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """Sum of ``partial`` over ``group`` (one all-reduce); the gradient goes to each rank's part unchanged."""
    if group.size() == 1:
        return partial
    whole: Tensor = _SumForward.apply(partial, group)  # type: ignore[no-untyped-call]  # torch's
    return whole
