"""Intervals by resampling instructions. The same resamples for every model, so that differences are paired."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

ROUNDS = 1000
SEED = 123


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float

    @classmethod
    def of(cls, replicates: np.ndarray) -> Interval:
        """From the 2.5th to the 97.5th percentile."""
        low, high = np.percentile(replicates, [2.5, 97.5])
        return cls(float(low), float(high))


def weighted_means(values: np.ndarray, weights: np.ndarray | None = None, *, stream: int = 0) -> np.ndarray:
    """Mean of each resample; with weights, the weighted mean (a resample without weight counts as nan).

    Which instructions a resample has is a function of their number and the ``stream`` alone.
    """
    chosen = np.random.default_rng(SEED + stream).integers(0, len(values), size=(ROUNDS, len(values)))
    means: np.ndarray
    if weights is None:
        means = values[chosen].mean(axis=1)
        return means
    total = weights[chosen].sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (values * weights)[chosen].sum(axis=1) / total
    return means
