from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_lmpo.data.example import Example, PackedSequence, Response
from nemo_lmpo.data.pack import example_tokens, imbalance, pack_examples, plan_micro_batches
from nemo_lmpo.errors import ConfigError, DataError
from nemo_lmpo.training.batches import ExampleList

# Two pairs small enough to lay by hand; the second one's chosen response is a single token.
FIRST = Example.pair("a", [10, 11, 12], [20, 21, 22], [30, 31])
SECOND = Example.pair("b", [13, 14], [40], [50, 51, 52])


def test_row_sharing_prompts_by_hand() -> None:
    row = pack_examples([FIRST, SECOND], [5, 2], share_prompt=True, pad_to_multiple=8, pad_id=99)
    # a: prompt 0-2, chosen 3-4 (20 21), rejected 5 (30); b: prompt 6-7, no chosen input, rejected 8-9 (50 51)
    assert row.input_ids.tolist() == [[10, 11, 12, 20, 21, 30, 13, 14, 50, 51, 99, 99, 99, 99, 99, 99]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]
    assert row.segments.tolist() == [
        [0, 3, 0, 0], [3, 2, 0, 3], [5, 1, 0, 3],
        [6, 2, 0, 0], [8, 2, 6, 2],
        [10, 6, 0, 0],
    ]  # fmt: skip
    assert row.segments.dtype == torch.int32
    assert row.predict_positions.tolist() == [2, 3, 4, 2, 5, 7, 7, 8, 9]
    assert row.target_ids.tolist() == [20, 21, 22, 30, 31, 40, 50, 51, 52]
    assert row.sequence_index.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3]
    assert row.example_index.tolist() == [5, 2]
    assert row.response_lengths.tolist() == [[3, 2], [1, 3]]
    assert row.response_lengths.dtype == torch.float32
    assert row.reference_logps is None


def test_row_with_the_prompt_twice_by_hand() -> None:
    row = pack_examples([FIRST, SECOND], [0, 1], share_prompt=False)
    assert row.input_ids.tolist() == [[10, 11, 12, 20, 21, 10, 11, 12, 30, 13, 14, 13, 14, 50, 51]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 0, 1, 2, 3]]
    assert row.segments.tolist() == [[0, 5, 0, 0], [5, 4, 0, 0], [9, 2, 0, 0], [11, 4, 0, 0]]
    assert row.predict_positions.tolist() == [2, 3, 4, 7, 8, 10, 12, 13, 14]
    assert row.target_ids.tolist() == [20, 21, 22, 30, 31, 40, 50, 51, 52]
    assert row.sequence_index.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3]


def test_empty_row_holds_only_padding() -> None:
    row = pack_examples([], [], share_prompt=True, pad_to_multiple=4, pad_id=7)
    assert row.input_ids.tolist() == [[7, 7, 7, 7]]
    assert row.segments.tolist() == [[0, 4, 0, 0]]
    assert row.num_examples == 0
    assert row.predict_positions.tolist() == []
    assert row.response_lengths.shape == (0, 2)


def test_no_padding_when_the_row_is_already_a_multiple() -> None:
    row = pack_examples([FIRST], [0], share_prompt=True, pad_to_multiple=6)
    assert row.num_tokens == 6
    assert len(row.segments) == 3


def test_reference_logps_only_when_every_pair_has_them() -> None:
    known = Example.pair("a", [1], [2], [3], -1.5, -2.5)
    row = pack_examples([known, known], [0, 1], share_prompt=True)
    assert row.reference_logps.tolist() == [[-1.5, -2.5], [-1.5, -2.5]]
    assert pack_examples([known, FIRST], [0, 1], share_prompt=True).reference_logps is None
    whole = Example.pair("a", [1], [2], [3], -1.5, -2.5, (-0.5, -2.5))
    both = pack_examples([whole, whole], [0, 1], share_prompt=True).reference_logps
    assert both.tolist() == [[-1.5, -2.5, -0.5, -2.5]] * 2
    assert pack_examples([whole, known], [0, 1], share_prompt=True).reference_logps.shape == (2, 2)


def visible(row: PackedSequence, place: int) -> tuple[Any, ...]:
    """Tokens and positions that the row's place may attend to, by the words of the layout's definition."""
    start, _, prefix, prefix_length = next(s for s in row.segments.tolist() if s[0] <= place < s[0] + s[1])
    places = [*range(prefix, prefix + prefix_length), *range(start, place + 1)]
    return row.input_ids[0, places].tolist(), row.position_ids[0, places].tolist()


ids = st.lists(st.integers(0, 1000), min_size=1, max_size=7)
pairs = st.builds(Example.pair, st.just("p"), ids, ids, ids)


@st.composite
def conversations(draw: Callable[..., Any]) -> Example | None:
    """One response of several spans with gaps between them; it begins and ends with what is predicted."""
    said: list[int] = []
    spans: list[tuple[int, int]] = []
    for number in range(draw(st.integers(1, 3))):
        said += draw(ids) if number else []
        turn = draw(ids)
        spans.append((len(said), len(said) + len(turn)))
        said += turn
    return Example("c", draw(ids), (Response(said, tuple(spans)),))


@settings(max_examples=200, deadline=None)
@given(
    examples=st.lists(pairs, max_size=5) | st.lists(conversations(), min_size=1, max_size=5),
    share_prompt=st.booleans(),
    multiple=st.integers(1, 9),
)
def test_every_target_is_predicted_from_exactly_what_stands_before_it(
    examples: list[Example], share_prompt: bool, multiple: int
) -> None:
    responses = len(examples[0].responses) if examples else 2
    row = pack_examples(
        examples,
        list(range(len(examples))),
        share_prompt=share_prompt,
        responses=responses,
        pad_to_multiple=multiple,
    )
    assert row.num_tokens % multiple == 0
    # segments tile the row
    assert torch.cat([torch.arange(s[0], s[0] + s[1]) for s in row.segments.tolist()]).tolist() == list(
        range(row.num_tokens)
    )
    wanted = []
    for number, example in enumerate(examples):
        for place, response in enumerate(example.responses):
            for start, stop in response.spans or [(0, len(response.ids))]:
                sequence = responses * number + place
                wanted += [
                    (sequence, example.prompt_ids + response.ids[:at], response.ids[at]) for at in range(start, stop)
                ]
    found = []
    for place, target, sequence in zip(
        row.predict_positions.tolist(), row.target_ids.tolist(), row.sequence_index.tolist(), strict=True
    ):
        tokens, positions = visible(row, place)
        assert positions == list(range(len(tokens)))
        found.append((sequence, tokens, target))
    assert found == wanted
    counts = [[response.predicted for response in example.responses] for example in examples]
    assert row.response_lengths.tolist() == counts
    if examples:
        lengths = ExampleList(examples).lengths
        padding = -int(example_tokens(lengths, share_prompt).sum()) % multiple
        assert row.num_tokens == example_tokens(lengths, share_prompt).sum() + padding


lengths_lists = st.lists(st.tuples(*[st.integers(1, 40)] * 3), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@given(
    pairs=lengths_lists,
    dp_size=st.integers(1, 4),
    multiple=st.integers(1, 3),
    max_pairs=st.one_of(st.none(), st.integers(1, 5)),
    share_prompt=st.booleans(),
    extra=st.integers(0, 200),
)
def test_plan_holds_every_pair_once_within_all_limits(
    pairs: list[Any], dp_size: int, multiple: int, max_pairs: int | None, share_prompt: bool, extra: int
) -> None:
    lengths = np.array(pairs)
    costs = example_tokens(lengths, share_prompt)
    budget = int(costs.max()) + extra
    options: dict[str, Any] = {
        "dp_size": dp_size, "row_tokens": budget, "max_examples_per_row": max_pairs,
        "share_prompt": share_prompt, "multiple_of_rows": multiple,
    }  # fmt: skip
    plan = plan_micro_batches(lengths, **options)
    assert len(plan) == dp_size
    assert len({len(rank) for rank in plan}) == 1
    assert len(plan[0]) % multiple == 0
    assert sorted(p for rank in plan for row in rank for p in row) == list(range(len(lengths)))
    for row in (row for rank in plan for row in rank):
        assert sum(costs[row]) <= budget
        assert max_pairs is None or len(row) <= max_pairs
    assert plan == plan_micro_batches(lengths, **options)
    assert imbalance(plan, lengths, share_prompt=share_prompt) >= 1.0


def test_plan_by_hand() -> None:
    # costs sharing prompts: 10, 8, 6, 4; two rows a rank would do, but one row for each of two ranks suffices
    lengths = np.array([[4, 4, 4], [4, 3, 3], [2, 3, 3], [2, 2, 2]])
    assert example_tokens(lengths, True).tolist() == [10, 8, 6, 4]
    assert example_tokens(lengths, False).tolist() == [14, 12, 8, 6]
    plan = plan_micro_batches(lengths, dp_size=2, row_tokens=14, max_examples_per_row=None, share_prompt=True)
    assert plan == [[[0, 3]], [[1, 2]]]
    assert imbalance(plan, lengths, share_prompt=True) == 1.0
    # one pair a row: the longest rows first, ranks balanced
    plan = plan_micro_batches(lengths, dp_size=2, row_tokens=14, max_examples_per_row=1, share_prompt=True)
    assert plan == [[[0], [3]], [[1], [2]]]


def test_more_rows_than_pairs_gives_empty_rows() -> None:
    plan = plan_micro_batches(
        np.array([[2, 2, 2]]), dp_size=2, row_tokens=8, max_examples_per_row=None, share_prompt=True, multiple_of_rows=2
    )
    assert [len(rank) for rank in plan] == [2, 2]
    assert sorted(row for rank in plan for row in rank) == [[], [], [], [0]]


def test_realistic_batch_is_balanced() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 0.6, size=(128, 3)), 8, 1000).astype(int)
    plan = plan_micro_batches(lengths, dp_size=4, row_tokens=4096, max_examples_per_row=None, share_prompt=True)
    assert imbalance(plan, lengths, share_prompt=True) < 1.01
    rows = sum(len(rank) for rank in plan)
    assert rows <= np.ceil(example_tokens(lengths, True).sum() / 4096 / 4) * 4 + 4


def test_default_budget_takes_any_pair_of_the_longest_allowed_length() -> None:
    longest = 64
    for prompt in (1, 30, 63):
        lengths = np.array([[prompt, longest - prompt, longest - prompt]])
        for share_prompt in (True, False):
            plan_micro_batches(
                lengths, dp_size=1, row_tokens=2 * longest, max_examples_per_row=None, share_prompt=share_prompt
            )


def test_a_pair_longer_than_the_budget_is_named() -> None:
    lengths = np.array([[2, 2, 2], [9, 9, 9]])
    with pytest.raises(DataError, match=r"pair 1 .* 25 tokens.*data.row_tokens=20"):
        plan_micro_batches(lengths, dp_size=1, row_tokens=20, max_examples_per_row=None, share_prompt=True)
    with pytest.raises(ConfigError, match=r"model.micro_batch_size=0"):
        plan_micro_batches(lengths, dp_size=1, row_tokens=99, max_examples_per_row=0, share_prompt=True)
