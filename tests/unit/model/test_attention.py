"""Packed attention against a dense softmax over an explicit mask, in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_lmpo.model import attention
from nemo_lmpo.model.attention import PackedSDPA
from nemo_lmpo.parallel.context import attention_spans, local_positions

HEAD_DIM = 8
# Two pairs with shared prompts, one response of a single token, and five tokens of padding in no segment.
SEGMENTS = [(0, 7, 0, 0), (7, 6, 0, 7), (13, 1, 0, 7), (14, 3, 0, 0), (17, 9, 14, 3), (26, 5, 14, 3)]
TOKENS, REAL = 36, 31


def states(heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(  # type: ignore[return-value]
        torch.randn(TOKENS, 1, count, HEAD_DIM, generator=generator, dtype=torch.float64).requires_grad_()
        for count in (heads, groups, groups)
    )


def positions() -> list[int]:
    """Each token's place in its sequence; a response goes on where its prompt ends."""
    result = [0] * TOKENS
    for start, length, _, prefix_length in SEGMENTS:
        for i in range(length):
            result[start + i] = prefix_length + i
    return result


def dense(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float) -> Tensor:
    """Softmax over all keys that a token may see: those of its sequence, not later, within the window."""
    mask = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    place = positions()
    for start, length, prefix_start, prefix_length in SEGMENTS:
        for q in range(start, start + length):
            for k in [*range(prefix_start, prefix_start + prefix_length), *range(start, q + 1)]:
                mask[q, k] = window is None or place[q] - place[k] < window
    repeat = query.shape[2] // key.shape[2]
    key, value = (x.squeeze(1).repeat_interleave(repeat, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.squeeze(1), key) * scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, value).reshape(TOKENS, 1, -1)


def packed(window: int | None, scale: float | None = None) -> PackedSDPA:
    config: Any = SimpleNamespace(window_size=(window - 1, 0) if window else None)
    return PackedSDPA(config, layer_number=1, softmax_scale=scale)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("window", [None, 1, 4, 9, 100])
def test_equals_dense_attention_with_gradients(heads: int, groups: int, window: int | None) -> None:
    query, key, value = states(heads, groups)
    spans = attention_spans(torch.tensor(SEGMENTS), TOKENS, cp_rank=0, cp_size=1)
    found = packed(window)(query, key, value, spans)
    expected = dense(query, key, value, window, HEAD_DIM**-0.5)
    torch.testing.assert_close(found, expected)
    assert not found[REAL:].any(), "padding attends to nothing"
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(found, (query, key, value), upstream),
        torch.autograd.grad(expected, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_scale_is_taken_from_the_model() -> None:
    query, key, value = states(4, 2)
    spans = attention_spans(torch.tensor(SEGMENTS), TOKENS, cp_rank=0, cp_size=1)
    torch.testing.assert_close(packed(None, 0.7)(query, key, value, spans), dense(query, key, value, None, 0.7))


def test_padding_between_segments_gets_zeros() -> None:
    query, key, value = states(2, 2)
    segments = torch.tensor([(4, 3, 0, 0), (9, 2, 4, 3)])
    found = packed(None)(query, key, value, attention_spans(segments, TOKENS, cp_rank=0, cp_size=1))
    empty = [*range(4), 7, 8, *range(11, TOKENS)]
    assert not found[empty].any()
    torch.testing.assert_close(found[4].flatten(), value[4].flatten())  # sees itself only


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("cp_size", [2, 3])
def test_context_parallel_parts_make_up_the_whole(
    window: int | None, cp_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank's queries against the whole row's keys; gathering itself is tested on real processes."""
    query, key, value = states(4, 2)
    expected = dense(query, key, value, window, HEAD_DIM**-0.5)
    whole = {id(key): key, id(value): value}
    monkeypatch.setattr(attention, "gather_row", lambda part, group: whole[id(part)])
    module = packed(window)
    module.cp_group = object()  # type: ignore[assignment]
    for rank in range(cp_size):
        held = local_positions(TOKENS, cp_rank=rank, cp_size=cp_size)
        spans = attention_spans(torch.tensor(SEGMENTS), TOKENS, cp_rank=rank, cp_size=cp_size)
        torch.testing.assert_close(module(query[held], key, value, spans), expected[held])
