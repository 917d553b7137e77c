"""torch's flash attention operator on CPUs, by definition: what the GPU kernel computes, one span after the other.

Registered for the operator itself, so that everything above it (the public function, its derivative, the model) is
the code that runs on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

CALLS: list[str] = []
"""Names of the operators that ran, in order."""


class Spans:
    """The spans of a call, in float64, with their attention weights."""

    def __init__(
        self,
        states: tuple[Tensor, Tensor, Tensor],
        offsets: tuple[Tensor, Tensor],
        longest: tuple[int, int],
        *,
        scale: float | None,
        bounds: tuple[int, int],
    ) -> None:
        query, key, value = states
        assert all(part.dtype == torch.int32 for part in offsets), "the kernel takes int32 offsets only"
        assert all(part.stride(-1) == 1 for part in states), "the kernel wants whole heads side by side"
        assert tuple(int(part.diff().max()) for part in offsets) == longest
        assert [int(part[-1]) for part in offsets] == [query.shape[0], key.shape[0]]
        self.scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.repeat = query.shape[1] // key.shape[1]
        lengths = [part.diff().tolist() for part in offsets]
        self.queries = query.double().split(lengths[0])
        self.keys, self.values = (
            states.double().repeat_interleave(self.repeat, dim=1).split(lengths[1]) for states in (key, value)
        )
        self.lengths = lengths
        self.weights = [self._weights(q, k, *bounds) for q, k in zip(self.queries, self.keys, strict=True)]

    def _weights(self, query: Tensor, key: Tensor, left: int, right: int) -> Tensor:
        """``[heads, queries, keys]``, aligned at the last key; ``left`` and ``right`` bound the keys seen (-1: all)."""
        place = torch.arange(query.shape[0])[:, None] + key.shape[0] - query.shape[0]
        other = torch.arange(key.shape[0])[None]
        seen = torch.ones(query.shape[0], key.shape[0], dtype=torch.bool)
        if left >= 0:
            seen &= other >= place - left
        if right >= 0:
            seen &= other <= place + right
        scores = torch.einsum("qhd,khd->hqk", query, key) * self.scale
        return scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)

    def attended(self) -> Tensor:
        return torch.cat([torch.einsum("hqk,khd->qhd", w, v) for w, v in zip(self.weights, self.values, strict=True)])

    def gradients(self, upstream: Tensor) -> tuple[Tensor, ...]:
        """Of queries, keys and values; softmax's derivative is ``w * (d - sum(w * d))``."""
        found: list[tuple[Tensor, ...]] = []
        for gradient, query, key, value, weights in zip(
            upstream.double().split(self.lengths[0]), self.queries, self.keys, self.values, self.weights, strict=True
        ):
            of_weights = torch.einsum("qhd,khd->hqk", gradient, value)
            of_scores = weights * (of_weights - (weights * of_weights).sum(dim=-1, keepdim=True)) * self.scale
            of_keys = torch.einsum("hqk,qhd->khd", of_scores, query)
            of_values = torch.einsum("hqk,qhd->khd", weights, gradient)
            found.append(
                (torch.einsum("hqk,khd->qhd", of_scores, key), self._of_groups(of_keys), self._of_groups(of_values))
            )
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def _of_groups(self, gradient: Tensor) -> Tensor:
        return gradient.unflatten(1, (-1, self.repeat)).sum(dim=2)  # type: ignore[no-any-return]


def _bounds(causal: bool, left: int | None, right: int | None) -> tuple[int, int]:
    return (-1 if left is None else left), (0 if causal else -1 if right is None else right)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, q: Tensor, k: Tensor, max_q: int, max_k: int, dropout: float,
    is_causal: bool, debug: bool, *, scale: float | None = None, window_size_left: int | None = None,
    window_size_right: int | None = None, **_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    CALLS.append("forward")
    assert dropout == 0.0
    bounds = _bounds(is_causal, window_size_left, window_size_right)
    spans = Spans((query, key, value), (q, k), (max_q, max_k), scale=scale, bounds=bounds)
    nothing = torch.zeros(2, dtype=torch.uint64)
    statistics = torch.zeros(query.shape[1], query.shape[0])
    return spans.attended().to(query.dtype), statistics, nothing, nothing.clone(), torch.empty(0)


def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, statistics: Tensor, q: Tensor, k: Tensor,
    max_q: int, max_k: int, dropout: float, is_causal: bool, rng: Tensor, unused: Tensor, *,
    scale: float | None = None, window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    CALLS.append("backward")
    bounds = _bounds(is_causal, window_size_left, window_size_right)
    spans = Spans((query, key, value), (q, k), (max_q, max_k), scale=scale, bounds=bounds)
    found = spans.gradients(gradient)
    return tuple(part.to(states.dtype) for part, states in zip(found, (query, key, value), strict=True))


@contextmanager
def flash_on_cpu() -> Iterator[list[str]]:
    """Register the reference for a block; gives the list of calls."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", _forward, "CPU")
        library.impl("_flash_attention_backward", _backward, "CPU")
        CALLS.clear()
        yield CALLS
