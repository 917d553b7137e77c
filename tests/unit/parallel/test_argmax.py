"""The most probable token of one part of the vocabulary; several parts are in tests/distributed/test_samples.py."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_lmpo.parallel.argmax import vocab_parallel_argmax
from nemo_lmpo.parallel.logprobs import VocabularyPart


def argmax(logits: list[list[float]], *, first: int = 0, vocab_size: int = 100) -> list[int]:
    """With an output matrix that is the identity, hidden states are the logits."""
    hidden = torch.tensor(logits)
    part = VocabularyPart(first, vocab_size)
    return vocab_parallel_argmax(hidden, torch.eye(hidden.shape[1]), part=part, group=None).tolist()


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([0.0, 3.0, 1.0, 2.0], 1),
        ([3.0, 1.0, 3.0, 3.0], 0),  # of equal ones the lowest
        ([-5.0, -2.0, -2.0, -9.0], 1),
        ([math.nan, 1.0, 2.0, math.nan], 2),
        ([math.nan] * 4, 0),
    ],
)
def test_by_hand(logits: list[float], expected: int) -> None:
    # A NaN would spread over the whole product; with one row a position there is no other one to meet.
    hidden, part = torch.ones(1, 1), VocabularyPart(0, 100)
    assert vocab_parallel_argmax(hidden, torch.tensor(logits)[:, None], part=part, group=None).tolist() == [expected]


def test_padding_is_never_chosen_and_ids_count_from_the_part() -> None:
    rows = [[1.0, 2.0, 9.0, 9.0], [4.0, 2.0, 9.0, 9.0]]
    assert argmax(rows, first=8, vocab_size=10) == [9, 8]
    assert argmax(rows, first=8, vocab_size=12) == [10, 10]


def test_no_positions() -> None:
    empty, part = torch.zeros(0, 4), VocabularyPart(0, 4)
    assert vocab_parallel_argmax(empty, torch.eye(4), part=part, group=None).tolist() == []
