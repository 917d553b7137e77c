"""Counts of a step against enumeration, and the values of pairs as metrics."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_lmpo.config.loss_section import parse_loss
from nemo_lmpo.data.example import Example, PackedSequence
from nemo_lmpo.data.pack import pack_examples
from nemo_lmpo.loss.registry import build_loss
from nemo_lmpo.training.batches import attended_pairs, fed_tokens, localize
from nemo_lmpo.training.pair_metrics import STATISTIC, PairMetrics, pair_columns

LENGTHS = st.lists(st.tuples(*[st.integers(1, 12)] * 3), min_size=1, max_size=5)
CPU = torch.device("cpu")


def row_of(lengths: list[tuple[int, int, int]], *, share_prompt: bool, pad: int = 1) -> PackedSequence:
    pairs = [Example.pair(str(i), [1] * p, [2] * c, [3] * r) for i, (p, c, r) in enumerate(lengths)]
    return pack_examples(pairs, list(range(len(pairs))), share_prompt=share_prompt, pad_to_multiple=pad)


@given(LENGTHS, st.booleans())
def test_counts_are_those_of_the_rows(lengths: list[tuple[int, int, int]], share_prompt: bool) -> None:
    row = row_of(lengths, share_prompt=share_prompt)
    seen = 0
    for _, length, _, prefix in row.segments.tolist():
        seen += sum(prefix + i + 1 for i in range(length))
    assert fed_tokens(np.array(lengths), share_prompt=share_prompt) == row.num_tokens
    assert attended_pairs(np.array(lengths), share_prompt=share_prompt) == seen


@given(LENGTHS, st.booleans(), st.sampled_from([1, 2]))
def test_targets_within_the_common_length(
    lengths: list[tuple[int, int, int]], share_prompt: bool, cp_size: int
) -> None:
    row = row_of(lengths, share_prompt=share_prompt, pad=2 * cp_size)
    found = []
    for rank in range(cp_size):
        part = localize(row, cp_rank=rank, cp_size=cp_size)
        assert part.shared.shape == part.sequence_index.shape
        found += part.sequence_index[part.shared].tolist()
    expected = [
        2 * number + side for number, (_, *both) in enumerate(lengths) for side in (0, 1) for _ in range(min(both))
    ]
    assert sorted(found) == sorted(expected)


def test_the_first_targets_are_the_shared_ones() -> None:
    row = localize(row_of([(2, 4, 1), (1, 2, 3)], share_prompt=True), cp_rank=0, cp_size=1)
    assert row.sequence_index.tolist() == [0, 0, 0, 0, 1, 2, 2, 3, 3, 3]
    assert row.shared.tolist() == [True, False, False, False, True, True, True, True, True, False]


def test_attended_pairs_by_hand() -> None:
    # Prompt of 3, chosen of 2 + 1 and rejected of 1 + 1 (the last is not fed): 6 + (2 * 3 + 3) + (3 + 1).
    lengths = np.array([[3, 3, 2]])
    assert attended_pairs(lengths, share_prompt=True) == 19
    assert attended_pairs(lengths, share_prompt=False) == 25
    # Two newest keys each: 1 + 2 + 2, then 2 for each of the three response tokens.
    assert attended_pairs(lengths, share_prompt=True, window=2) == 11


@given(LENGTHS, st.sampled_from([1, 2, 4]))
def test_ranks_of_a_row_predict_every_target_once(lengths: list[tuple[int, int, int]], cp_size: int) -> None:
    row = row_of(lengths, share_prompt=True, pad=2 * cp_size)
    parts = [localize(row, cp_rank=rank, cp_size=cp_size) for rank in range(cp_size)]
    found = []
    for part in parts:
        assert part.input_ids.shape == part.position_ids.shape == (1, row.num_tokens // cp_size)
        assert part.num_examples == len(lengths)
        found += list(zip(part.target_ids.tolist(), part.sequence_index.tolist(), strict=True))
    expected = zip(row.target_ids.tolist(), row.sequence_index.tolist(), strict=True)
    assert sorted(found) == sorted(expected)
    for part in parts:  # each stands where the whole row predicts it
        tokens = part.input_ids[0, part.predict_positions]
        positions = part.position_ids[0, part.predict_positions]
        whole = {
            (int(row.input_ids[0, p]), int(row.position_ids[0, p]), int(t))
            for p, t in zip(row.predict_positions, row.target_ids, strict=True)
        }
        ours = zip(tokens.tolist(), positions.tolist(), part.target_ids.tolist(), strict=True)
        assert set(ours) <= whole


def test_metrics_of_each_source_by_hand() -> None:
    columns = pair_columns(build_loss(parse_loss({"name": "sft"})))
    pairs = PairMetrics(columns, 3, CPU)
    values = {name: torch.zeros(3) for name in columns}
    values |= {
        "rewards/chosen": torch.tensor([1.0, 1.0, 5.0]),
        "rewards/rejected": torch.tensor([0.0, 3.0, 4.5]),
        "lengths/chosen": torch.tensor([4.0, 8.0, 100.0]),
        "lengths/rejected": torch.tensor([2.0, 1.0, 1.0]),
    }
    pairs.put(torch.arange(3), values)
    found = pairs.by_source(np.array([0, 0, 2]), ["short", "absent", "long"])
    assert {
        name: value for name, value in found.items() if name.split("/", 1)[1].startswith(("rewards", "lengths"))
    } == {
        "short/rewards/accuracies": 0.5,
        "short/rewards/margins": -0.5,
        "short/lengths/chosen": 6.0,
        "short/lengths/rejected": 1.5,
        "long/rewards/accuracies": 1.0,
        "long/rewards/margins": 0.5,
        "long/lengths/chosen": 100.0,
        "long/lengths/rejected": 1.0,
    }
    assert pairs.by_source(np.array([0, 0, 0]), ["only"]) == {}


def test_metrics_of_two_pairs_by_hand() -> None:
    loss = build_loss(parse_loss({"name": "lmpo"}))
    columns = pair_columns(loss)
    pairs = PairMetrics(columns, 2, CPU)
    values = {name: torch.zeros(1) for name in columns}
    hand = {
        "loss": (1.0, 3.0),
        "rewards/chosen": (-1.0, -2.0),
        "rewards/rejected": (-1.5, -1.0),
        "logps/chosen_sum": (-8.0, -3.0),
        "logps/rejected_sum": (-10.0, -6.0),
        "lengths/chosen": (4.0, 1.0),
        "lengths/rejected": (5.0, 2.0),
    }
    for place in (1, 0):  # in any order
        given_values = {**values, **{name: torch.tensor([both[place]]) for name, both in hand.items()}}
        pairs.put(torch.tensor([place]), given_values)
    metrics = pairs.metrics()
    assert STATISTIC not in metrics
    expected = {
        "loss": 2.0,
        "rewards/chosen": -1.5,
        "rewards/rejected": -1.25,
        "rewards/margins": -0.25,
        "rewards/accuracies": 0.5,
        "logps/chosen": -2.5,  # mean of -8/4 and -3/1, not -11/5
        "logps/rejected": -2.5,
        "logps/chosen_sum": -5.5,
        "logps/rejected_sum": -8.0,
        "lengths/chosen": 2.5,
        "lengths/rejected": 3.5,
    }
    assert {name: metrics[name] for name in expected} == expected
    assert set(metrics) == {*expected, "lmpo/margin", "lmpo/margin_normalized", "lmpo/p_chosen", "lmpo/p_rejected"}


def test_values_that_are_not_finite_are_found() -> None:
    pairs = PairMetrics(("loss",), 4, CPU)
    pairs.put(torch.tensor([1, 3]), {"loss": torch.tensor([math.nan, -math.inf])})
    assert pairs.not_finite() == [1, 3]


def test_no_pairs_have_no_mean() -> None:
    columns = pair_columns(build_loss(parse_loss({"name": "simpo"})))
    assert math.isnan(PairMetrics(columns, 0, CPU).metrics()["loss"])


@pytest.mark.parametrize("name", ["lmpo", "dpo", "ipo", "slic", "cpo", "kto", "orpo", "simpo", "sft"])
def test_every_loss_fills_its_columns(name: str) -> None:
    columns = pair_columns(build_loss(parse_loss({"name": name})))
    assert len(columns) == len(set(columns))
    assert (STATISTIC in columns) == (name in ("lmpo", "kto"))


def test_a_single_rank_shares_with_nobody() -> None:
    group = SimpleNamespace(size=lambda: 1)
    groups: Any = SimpleNamespace(is_last_stage=True, data=group, pipeline=group)
    pairs = PairMetrics(("loss",), 1, CPU)
    pairs.share(groups)
    assert pairs.values.tolist() == [[0.0]]
