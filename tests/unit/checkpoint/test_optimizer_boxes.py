"""A shard of a flattened parameter as boxes of the parameter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_lmpo.checkpoint.boxes import boxes_of_range

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@given(SHAPES, st.data())
def test_boxes_hold_the_range_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, math.prod(shape)))
    stop = data.draw(st.integers(start, math.prod(shape)))
    numbers = torch.arange(math.prod(shape)).view(shape)
    found = []
    for offsets, sizes in boxes_of_range(shape, start, stop):
        assert all(size > 0 for size in sizes)
        assert all(at + size <= most for at, size, most in zip(offsets, sizes, shape, strict=True))
        found += (
            numbers[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))].flatten().tolist()
        )
    assert found == list(range(start, stop))


@pytest.mark.parametrize(
    ("start", "stop", "boxes"),
    [
        (0, 12, [((0, 0), (3, 4))]),
        (2, 11, [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 3))]),
        (5, 7, [((1, 1), (1, 2))]),
        (2, 5, [((0, 2), (1, 2)), ((1, 0), (1, 1))]),
        (4, 9, [((1, 0), (1, 4)), ((2, 0), (1, 1))]),
        (7, 7, []),
    ],
)
def test_a_matrix_of_three_rows_of_four(start: int, stop: int, boxes: list[Any]) -> None:
    assert list(boxes_of_range((3, 4), start, stop)) == boxes
