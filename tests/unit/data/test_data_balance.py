"""Exchanging pairs evens out the lengths of a step's packed sequences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_lmpo.data.balance import even_out
from nemo_lmpo.data.pack import example_tokens, plan_micro_batches


@given(st.lists(st.lists(st.integers(1, 300), max_size=8), min_size=1, max_size=8))
def test_keeps_every_pair_and_never_makes_the_longest_longer(tokens: list[list[int]]) -> None:
    costs = np.array([cost for row in tokens for cost in row], dtype=np.int64)
    places = iter(range(len(costs)))
    rows = [[next(places) for _ in row] for row in tokens]
    sizes = [len(row) for row in rows]
    longest = max(int(costs[row].sum()) for row in rows)
    even_out(rows, costs)
    assert [len(row) for row in rows] == sizes
    assert sorted(place for row in rows for place in row) == list(range(len(costs)))
    assert max(int(costs[row].sum()) for row in rows) <= longest


def test_by_hand() -> None:
    """Loads 17 and 9; exchanging 8 for 4 leaves 13 and 13."""
    rows = [[0, 1], [2, 3]]
    even_out(rows, np.array([9, 8, 4, 5]))
    assert sorted(map(sorted, rows)) == [[0, 2], [1, 3]]


@pytest.mark.parametrize(("replicas", "budget"), [(1, 4096), (4, 4096), (2, 8192)])
def test_within_two_percent_on_lengths_like_ultrafeedback(replicas: int, budget: int) -> None:
    """Padding to the longest costs what the longest exceeds the mean."""
    generator = np.random.default_rng(5)
    prompts = np.clip(generator.lognormal(4.9, 0.8, 128), 20, 1024).astype(int)
    responses = [np.clip(generator.lognormal(mean, 0.65, 128), 10, 1024).astype(int) for mean in (5.4, 5.2)]
    lengths = np.stack([prompts, *responses], axis=1)
    plan = plan_micro_batches(
        lengths, dp_size=replicas, row_tokens=budget, max_examples_per_row=None, share_prompt=True
    )
    costs = example_tokens(lengths, share_prompt=True)
    loads = np.array([costs[row].sum() for rank in plan for row in rank])
    assert loads.max() / loads.mean() < 1.02
    assert loads.max() <= budget
