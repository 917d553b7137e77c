"""Pairs that fill micro-batches, for a program that is to run without data."""

from __future__ import annotations

import numpy as np

from nemo_lmpo.config.schema import Config
from nemo_lmpo.data.pair import PairTokens
from nemo_lmpo.plan.pairs import filling_lengths, pairs_of_a_row


class EqualPairs:
    """Pairs that all have the same lengths, so that every micro-batch is as long as the others.

    Their ids are of no consequence, and neither are the reference log-probabilities that some losses want.
    """

    def __init__(self, count: int, lengths: tuple[int, int, int]) -> None:
        self.lengths = np.tile(np.array([lengths], dtype=np.int64), (count, 1))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> PairTokens:
        prompt, chosen, rejected = (int(length) for length in self.lengths[index])
        return PairTokens(str(index), [1] * prompt, [1] * chosen, [1] * rejected, -1.0, -1.0, (-1.0, -1.0))


def filling_pairs(config: Config, micro_batches: int) -> EqualPairs:
    """As many pairs as fill ``micro_batches`` up to the row's budget."""
    return EqualPairs(pairs_of_a_row(config) * micro_batches, filling_lengths(config))
