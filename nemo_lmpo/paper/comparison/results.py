"""What the runs came to: means, standard errors, and whether a claim holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_lmpo.evaluate.bootstrap import Interval
from nemo_lmpo.paper.comparison.suites import START, Claim, Variant
from nemo_lmpo.paper.verdicts import NO_DIFFERENCE, NOT_MEASURED, UNDECIDED, verdict_of

Values = Mapping[tuple[Variant, int], Mapping[str, float]]
"""Measured numbers of each variant and seed that is finished."""


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds; the standard error is None for a single one."""

    mean: float
    error: float | None
    count: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and standard error (sample standard deviation over the square root of the count)."""
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), error, len(values))


def of_variant(values: Values, variant: Variant, measure: str) -> dict[int, float]:
    """A measure by seed. The start model's ``chosen_change`` is 0, and others' is since the start model."""
    if measure == "chosen_change":
        start = next(
            (found["chosen"] for (who, _), found in values.items() if who == START and "chosen" in found), None
        )
        chosen = of_variant(values, variant, "chosen")
        return {} if start is None else {seed: value - start for seed, value in chosen.items()}
    return {seed: found[measure] for (who, seed), found in values.items() if who == variant and measure in found}


@dataclass(frozen=True)
class Judgement:
    """A claim against the numbers."""

    claim: Claim
    verdict: str
    """One of :mod:`nemo_lmpo.paper.verdicts`."""
    high: Estimate | None = None
    low: Estimate | None = None
    difference: Estimate | None = None
    """Of high less low, paired by seed."""


def judge(claim: Claim, values: Values) -> Judgement:
    """Compare two variants seed by seed.

    The claim is shown (or contradicted) if the 95 % confidence interval of the mean paired difference lies above
    (or below) zero. With one seed there is no interval: then it is undecided unless there is no difference at all.
    """
    high, low = of_variant(values, claim.high, claim.measure), of_variant(values, claim.low, claim.measure)
    estimates = estimate(list(high.values())), estimate(list(low.values()))
    # The start model has one run, which every seed starts from.
    if claim.high == START and len(high) == 1:
        high = dict.fromkeys(low, *high.values())
    if claim.low == START and len(low) == 1:
        low = dict.fromkeys(high, *low.values())
    seeds = sorted(high.keys() & low.keys())
    difference = estimate([high[seed] - low[seed] for seed in seeds])
    if difference is None:
        return Judgement(claim, NOT_MEASURED)
    return Judgement(claim, _verdict(difference), *estimates, difference)


def interval_of(difference: Estimate) -> Interval | None:
    """Student's 95 % interval of a mean; None for a single value, which has none."""
    if difference.error is None:
        return None
    from scipy.stats import t as student

    half = float(student.ppf(0.975, difference.count - 1)) * difference.error
    return Interval(difference.mean - half, difference.mean + half)


def _verdict(difference: Estimate) -> str:
    if difference.mean == 0:
        return NO_DIFFERENCE
    interval = interval_of(difference)
    return UNDECIDED if interval is None else verdict_of(interval)
