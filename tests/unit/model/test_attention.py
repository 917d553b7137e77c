"""Packed attention against a dense softmax over an explicit mask, in float64, by every backend that has a CPU form."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_lmpo.model import attention, flash_attention
from nemo_lmpo.model.attention import PackedAttention, PackedSDPA
from nemo_lmpo.model.attention_plan import AttentionPlan, plan_attention
from nemo_lmpo.model.flash_attention import PackedFlashAttention
from nemo_lmpo.parallel.context import attention_spans, local_positions
from tests.flash_reference import flash_on_cpu

HEAD_DIM = 8
# Two pairs with shared prompts, one response of a single token, and five tokens of padding, which see themselves.
SHARED = [(0, 7, 0, 0), (7, 6, 0, 7), (13, 1, 0, 7), (14, 3, 0, 0), (17, 9, 14, 3), (26, 5, 14, 3), (31, 5, 0, 0)]
# The prompt before each response: nothing is gathered.
TWICE = [(0, 13, 0, 0), (13, 8, 0, 0), (21, 15, 0, 0)]
TOKENS = 36
Segments = list[tuple[int, int, int, int]]


def states(heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(  # type: ignore[return-value]
        torch.randn(TOKENS, 1, count, HEAD_DIM, generator=generator, dtype=torch.float64).requires_grad_()
        for count in (heads, groups, groups)
    )


def dense(query: Tensor, key: Tensor, value: Tensor, segments: Segments, window: int | None, scale: float) -> Tensor:
    """Softmax over all keys that a token may see: those of its sequence, not later, within the window."""
    mask = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    for start, length, prefix_start, prefix_length in segments:
        sequence = [*range(prefix_start, prefix_start + prefix_length), *range(start, start + length)]
        for q in range(prefix_length, len(sequence)):
            for k in range(q + 1):
                mask[sequence[q], sequence[k]] = window is None or q - k < window
    repeat = query.shape[2] // key.shape[2]
    key, value = (x.squeeze(1).repeat_interleave(repeat, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.squeeze(1), key) * scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value).reshape(TOKENS, 1, -1)


def plan(segments: Segments, cp_rank: int = 0, cp_size: int = 1) -> AttentionPlan:
    spans = attention_spans(torch.tensor(segments), TOKENS, cp_rank=cp_rank, cp_size=cp_size)
    return plan_attention(spans, TOKENS, cp_size=cp_size)


@pytest.fixture(params=["sdpa", "flash", "flash_operator"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[PackedAttention]]:
    """Each backend; flash through torch's public function and, as on older torch, through the operator."""
    if request.param == "sdpa":
        yield PackedSDPA
        return
    kernels = {"flash": flash_attention.public_kernel, "flash_operator": flash_attention.operator_kernel}
    monkeypatch.setattr(flash_attention, "flash_kernel", lambda: kernels[request.param])
    with flash_on_cpu() as calls:
        yield PackedFlashAttention
        assert "forward" in calls


def build(backend: type[PackedAttention], window: int | None, scale: float | None = None) -> PackedAttention:
    config: Any = SimpleNamespace(window_size=(window - 1, 0) if window else None)
    return backend(config, layer_number=1, softmax_scale=scale)


def assert_equal_with_gradients(found: Tensor, expected: Tensor, leaves: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(output, leaves, upstream) for output in (found, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("segments", [SHARED, TWICE], ids=["shared", "twice"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("window", [None, 1, 4, 9, 100])
def test_equals_dense_attention_with_gradients(
    backend: type[PackedAttention], segments: Segments, heads: int, groups: int, window: int | None
) -> None:
    leaves = states(heads, groups)
    found = build(backend, window)(*leaves, attention_bias=plan(segments))
    assert_equal_with_gradients(found, dense(*leaves, segments, window, HEAD_DIM**-0.5), leaves)


def test_scale_is_taken_from_the_model(backend: type[PackedAttention]) -> None:
    leaves = states(4, 2)
    found = build(backend, None, 0.7)(*leaves, attention_bias=plan(SHARED))
    torch.testing.assert_close(found, dense(*leaves, SHARED, None, 0.7))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("cp_size", [2, 3])
def test_context_parallel_parts_make_up_the_whole(
    backend: type[PackedAttention], window: int | None, cp_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank's queries against all ranks' keys, laid behind each other; gathering is tested on real processes."""
    query, key, value = states(4, 2)
    held = [local_positions(TOKENS, cp_rank=rank, cp_size=cp_size) for rank in range(cp_size)]
    of_all_ranks = torch.cat((key, value), dim=2).squeeze(1)[torch.cat(held)]
    monkeypatch.setattr(attention, "gather_over_ranks", lambda part, group: of_all_ranks)
    module = build(backend, window)
    module.cp_group = SimpleNamespace(size=lambda: cp_size)
    parts = [
        module(query[own], key[own], value[own], attention_bias=plan(SHARED, rank, cp_size))
        for rank, own in enumerate(held)
    ]
    found = torch.cat(parts)[torch.cat(held).argsort()]
    assert_equal_with_gradients(found, dense(query, key, value, SHARED, window, HEAD_DIM**-0.5), (query, key, value))


def test_nothing_is_gathered_where_keys_stand_as_they_are() -> None:
    assert plan(TWICE).keys is None
    assert plan(SHARED).keys is not None
    # All keys in place, but once more in front of the responses.
    assert plan(SHARED).key_lengths == (7, 13, 8, 3, 12, 8, 5)
    assert plan(SHARED).query_lengths == (7, 6, 1, 3, 9, 5, 5)


def test_a_query_in_no_span_is_refused() -> None:
    with pytest.raises(ValueError, match="do not cover the queries"):
        plan(SHARED[:-1])
    with pytest.raises(ValueError, match="do not cover the queries"):
        plan([*SHARED[:2], *SHARED[3:]])


def test_gradients_are_the_same_bits_every_time(backend: type[PackedAttention]) -> None:
    """Keys are used up to three times; the sum of their gradients has one order."""
    leaves = tuple(leaf.detach().float().requires_grad_() for leaf in states(4, 2))
    runs = []
    for _ in range(2):
        found = build(backend, None)(*leaves, attention_bias=plan(SHARED))
        runs.append(torch.autograd.grad(found.square().sum(), leaves))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
