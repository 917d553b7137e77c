"""What a context-parallel rank holds and attends to, against a mask written out position by position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_lmpo.parallel.context import attention_spans, local_positions

Layout = list[tuple[int, int, int, int]]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, int, int]:
    """Segments of a row of pairs with shared prompts and padding, its length, and a context-parallel size."""
    cp_size = draw(st.sampled_from([1, 2, 4]))
    segments: Layout = []
    filled = 0
    for _ in range(draw(st.integers(0, 3))):
        prompt = (filled, draw(st.integers(1, 9)))
        segments.append((*prompt, 0, 0))
        filled += prompt[1]
        for _ in range(2):
            length = draw(st.integers(0, 9))
            if length:
                segments.append((filled, length, *prompt))
                filled += length
    multiple = 2 * cp_size
    total = max(-(-filled // multiple) * multiple, multiple)
    if total > filled and draw(st.booleans()):
        segments.append((filled, total - filled, 0, 0))
    return segments, total, cp_size


def dense_mask(segments: Layout, total: int) -> np.ndarray:
    """Who sees whom, from the definition alone."""
    mask = np.zeros((total, total), dtype=bool)
    for start, length, prefix_start, prefix_length in segments:
        for query in range(start, start + length):
            mask[query, prefix_start : prefix_start + prefix_length] = True
            mask[query, start : query + 1] = True
    return mask


@given(layouts())
@settings(max_examples=200, deadline=None)
def test_pieces_of_all_ranks_are_the_dense_mask(layout: tuple[Layout, int, int]) -> None:
    segments, total, cp_size = layout
    found = np.zeros((total, total), dtype=bool)
    for rank in range(cp_size):
        held = local_positions(total, cp_rank=rank, cp_size=cp_size)
        spans = attention_spans(torch.tensor(segments).reshape(-1, 4), total, cp_rank=rank, cp_size=cp_size)
        filled = 0
        for query_start, queries, prefix_start, prefix_length, own_start, own_length in spans.tolist():
            assert query_start >= filled, "spans overlap or are out of order"
            filled = query_start + queries
            for i in range(queries):
                row = found[held[query_start + i]]
                row[prefix_start : prefix_start + prefix_length] = True
                row[own_start : own_start + own_length - queries + i + 1] = True
    assert (found == dense_mask(segments, total)).all()


@given(st.integers(1, 12), st.sampled_from([1, 2, 3, 4]))
def test_positions_are_divided_among_the_ranks(chunk: int, cp_size: int) -> None:
    total = 2 * cp_size * chunk
    held = [local_positions(total, cp_rank=rank, cp_size=cp_size) for rank in range(cp_size)]
    assert sorted(torch.cat(held).tolist()) == list(range(total))
    # Causal work grows with the position: equal sums are equal work.
    assert len({int(positions.sum()) for positions in held}) == 1
    assert len({positions.numel() for positions in held}) == 1


def test_a_row_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="row of 10 tokens does not divide into 2 x 2 chunks"):
        local_positions(10, cp_rank=0, cp_size=2)
