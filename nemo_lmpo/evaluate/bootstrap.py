"""Intervals by resampling instructions. The same resamples for every model, so that differences are paired."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

ROUNDS = 1000
SEED = 123


@dataclass(frozen=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float

    @classmethod
    def of(cls, replicates: np.ndarray) -> Interval:
        """From the 2.5th to the 97.5th percentile."""
        low, high = np.percentile(replicates, [2.5, 97.5])
        return cls(float(low), float(high))


def resamples(count: int, rounds: int = ROUNDS, seed: int = SEED) -> np.ndarray:
    """Indices of each resample, shape (rounds, count): a function of its arguments alone."""
    return np.random.default_rng(seed).integers(0, count, size=(rounds, count))


def weighted_means(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Mean of each resample; with weights, the weighted mean (a resample without weight counts as nan)."""
    chosen = resamples(len(values))
    if weights is None:
        return values[chosen].mean(axis=1)
    total = weights[chosen].sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (values * weights)[chosen].sum(axis=1) / total


def by_task_means(scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Replicates of each task's mean; tasks are resampled on their own."""
    found = {}
    for place, (name, values) in enumerate(scores.items()):
        chosen = resamples(len(values), seed=SEED + place)
        found[name] = values[chosen].mean(axis=1)
    return found
