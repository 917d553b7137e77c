"""Differences between two models under one judge, paired by instruction, and what they say about a claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_lmpo.evaluate.bootstrap import Interval, weighted_means
from nemo_lmpo.evaluate.result import Result, read_units
from nemo_lmpo.evaluate.suites import ALPACA_EVAL, COLUMNS, TASKS
from nemo_lmpo.paper.verdicts import verdict_of


@dataclass(frozen=True)
class Difference:
    """First less second, with the interval of resampled instructions; or why there is none."""

    value: float | None = None
    interval: Interval | None = None
    pairs: int = 0
    reason: str = ""

    @property
    def verdict(self) -> str:
        """Whether the first is larger: the 95 % interval lies above zero, below it, or holds it."""
        return verdict_of(self.interval)


def compare(first: Result | None, second: Result | None, value: str) -> Difference:
    """First less second in `wr`, `lc` or `length` of one suite."""
    if first is None or second is None:
        return Difference(reason="not measured")
    reason = not_comparable(first, second, judged=value != "length")
    if reason:
        return Difference(reason=reason)
    one, two = read_units(first), read_units(second)
    if one["ids"] != two["ids"]:
        return Difference(reason="they answer other instructions")
    if value == "length":
        change = np.subtract(one["lengths"], two["lengths"], dtype=float)
        return Difference(float(change.mean()), Interval.of(weighted_means(change)), len(change))
    if value == "lc":
        return _length_controlled(first, second, one, two)
    return _win_rate(first, one, two)


def not_comparable(first: Result, second: Result, *, judged: bool) -> str:
    """Why two results cannot be compared; empty if they can."""
    if first.evaluation_set["sha256"] != second.evaluation_set["sha256"]:
        return "they answer other instructions"
    if judged and (first.judge is None or second.judge is None or first.judge.identity != second.judge.identity):
        return "they were judged by different judges"
    return ""


def _length_controlled(first: Result, second: Result, one: Mapping[str, Any], two: Mapping[str, Any]) -> Difference:
    replicates = [np.array(units["lc_replicates"]) for units in (one, two)]
    if not len(replicates[0]) or (one["rounds"], one["seed"]) != (two["rounds"], two["seed"]):
        return Difference(reason="their resamples differ; use one --bootstrap")
    value = first.values["lc"].value - second.values["lc"].value
    return Difference(value, Interval.of(replicates[0] - replicates[1]), len(one["ids"]))


def _win_rate(first: Result, one: Mapping[str, Any], two: Mapping[str, Any]) -> Difference:
    if first.suite == ALPACA_EVAL:
        pairs = [(win, other) for win, other in zip(one["wins"], two["wins"], strict=True) if None not in (win, other)]
        change = np.array([win - other for win, other in pairs])
        return Difference(float(change.mean()), Interval.of(weighted_means(change)), len(change))
    rates = [(np.array(units["wins"]), np.array(units["weights"])) for units in (one, two)]
    points = [float((wins * weights).sum() / weights.sum()) for wins, weights in rates]
    change = weighted_means(*rates[0]) - weighted_means(*rates[1])
    return Difference(points[0] - points[1], Interval.of(change), len(one["ids"]))


def paper_tasks(result: Result) -> dict[str, str]:
    """Which of a result's tasks stands in each column of Table 4: the first that was run."""
    found: dict[str, str] = {}
    for task in TASKS:
        if task.name in result.values:
            found.setdefault(task.column, task.name)
    return found


@dataclass(frozen=True)
class Ranks:
    """Average ranks over the ten tasks; 1 is best, ties share."""

    mean: Mapping[str, float]
    replicates: Mapping[str, np.ndarray]


def average_ranks(results: Mapping[str, Result]) -> Ranks | None:
    """Average rank of each method among those given; None unless at least two have all ten tasks."""
    complete = {name: result for name, result in results.items() if set(paper_tasks(result)) == set(COLUMNS)}
    if len(complete) < 2:
        return None
    from scipy.stats import rankdata

    drawn = []
    for column in COLUMNS:
        names = {method: paper_tasks(result)[column] for method, result in complete.items()}
        units = {method: read_units(complete[method])[name] for method, name in names.items()}
        if len({tuple(one["ids"]) for one in units.values()}) != 1:
            return None
        arrays = [np.array(one["values"]) for one in units.values()]
        # One stream for all methods: the same documents are drawn for each. The mean itself stands first.
        drawn.append([[array.mean(), *weighted_means(array)] for array in arrays])
    # 1 for the largest, equal ones share the mean of theirs. Shape (methods, 1 + rounds).
    ranks = rankdata(-np.array(drawn), axis=1).mean(axis=0)
    every = dict(zip(complete, ranks, strict=True))
    return Ranks({one: float(row[0]) for one, row in every.items()}, {one: row[1:] for one, row in every.items()})


def compare_ranks(ranks: Ranks | None, first: str, second: str) -> Difference:
    """First's average rank less second's; a rank is better the smaller it is."""
    if ranks is None or first not in ranks.mean or second not in ranks.mean:
        return Difference(reason="not measured")
    change = ranks.replicates[first] - ranks.replicates[second]
    return Difference(ranks.mean[first] - ranks.mean[second], Interval.of(change), len(COLUMNS))


def newest(results: Sequence[Result]) -> Result | None:
    """The newest of several results of one row; whole ones before trials."""
    return max(results, key=lambda result: (result.whole, result.date), default=None)
