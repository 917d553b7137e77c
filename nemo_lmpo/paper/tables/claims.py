"""What the paper claims, as differences that a page can judge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nemo_lmpo.evaluate.result import Result
from nemo_lmpo.evaluate.suites import ALPACA_EVAL, ARENA_HARD, LEADERBOARD, METHODS, SETTINGS, lambda_variant
from nemo_lmpo.paper.tables.differences import Difference, Ranks, average_ranks, compare, compare_ranks, newest
from nemo_lmpo.paper.tables.published import TABLE1, TABLE2, TABLE2_SETTING, TABLE3, TABLE3_SETTING, TABLE4

TableRow = tuple[str, str, str | None]
"""Setting, method, variant."""


PLACES = {
    "lc": (ALPACA_EVAL, "lc", "LC %"),
    "wr": (ALPACA_EVAL, "wr", "WR %"),
    "length": (ALPACA_EVAL, "length", "characters"),
    "arena_wr": (ARENA_HARD, "wr", "Arena-Hard WR %"),
    "arena_length": (ARENA_HARD, "length", "tokens"),
    "rank": (LEADERBOARD, "rank", "average rank"),
}
"""Columns of Table 1 and the ranks of Table 4: suite, value, title."""
_OVER_SIMPO = (
    (1, "LMPO answers shorter than SimPO", "length"),
    (1, "LMPO's length-controlled win rate is above SimPO's", "lc"),
    (1, "LMPO wins more in Arena-Hard than SimPO", "arena_wr"),
    (1, "LMPO's answers in Arena-Hard are shorter than SimPO's", "arena_length"),
    (4, "LMPO ranks before SimPO over the ten tasks", "rank"),
)
"""Claims of LMPO against SimPO: table, words, column. Answers are to be short, ranks low, win rates high."""


@dataclass(frozen=True)
class Claim:
    """`value` of ``larger`` is above that of ``smaller``."""

    table: int
    text: str
    suite: str
    value: str
    larger: TableRow
    smaller: TableRow
    published: float | None
    """The difference in the paper's numbers; None: the setting is none of the paper's."""


class Results:
    """Results by suite and row."""

    def __init__(self, results: Iterable[Result]) -> None:
        self.all = list(results)
        self._rows: dict[tuple[str, TableRow], list[Result]] = {}
        for result in self.all:
            model = result.model
            # Other instructions than the published do not belong beside the paper's numbers.
            theirs = model.setting in SETTINGS and result.evaluation_set.get("published") == "no"
            if model.setting is not None and model.method is not None and not theirs:
                key = (result.suite, (model.setting, model.method, model.variant))
                self._rows.setdefault(key, []).append(result)

    def row(self, suite: str, row: TableRow) -> Result | None:
        """The newest of a row."""
        return newest(self._rows.get((suite, row), []))

    def stands_for_a_row(self, result: Result) -> bool:
        """Whether it is shown in one of the paper's tables."""
        return any(result in found and key[1][1] in METHODS for key, found in self._rows.items())

    def several(self) -> list[str]:
        """Rows that more than one result stands for."""
        return [
            f"{suite}: {'/'.join(filter(None, row))}" for (suite, row), found in self._rows.items() if len(found) > 1
        ]

    def other_settings(self) -> list[str]:
        """Settings that were measured and are none of the paper's."""
        return sorted({row[0] for _, row in self._rows if row[0] not in SETTINGS})

    def settings(self) -> list[str]:
        """The paper's settings, then the others."""
        return [*SETTINGS, *self.other_settings()]

    def ranks(self, setting: str) -> Ranks | None:
        """Average ranks of the methods in a setting."""
        found = {
            row[1]: newest(results)
            for (suite, row), results in self._rows.items()
            if suite == LEADERBOARD and row[0] == setting and row[2] is None
        }
        return average_ranks({method: result for method, result in found.items() if result is not None})


def claims_of(setting: str) -> list[Claim]:
    """The paper's claims for a setting; for one that is not the paper's, those that it makes of all.

    Where the paper's own numbers say the opposite of its words, the claim is left out.
    """
    found = [*_over_simpo(setting), *_table2(setting), *_table3(setting)]
    return [claim for claim in found if claim.published is None or claim.published > 0]


def _over_simpo(setting: str) -> Iterator[Claim]:
    lmpo, simpo = (setting, "LMPO", None), (setting, "SimPO", None)
    for table, text, column in _OVER_SIMPO:
        suite, value, _ = PLACES[column]
        larger, smaller = (simpo, lmpo) if value in ("length", "rank") else (lmpo, simpo)
        paper = TABLE4 if suite == LEADERBOARD else TABLE1
        there = (setting, "LMPO") in paper
        published = paper[larger[:2]][column] - paper[smaller[:2]][column] if there else None
        yield Claim(table, text, suite, value, larger, smaller, published)


def _table2(setting: str) -> list[Claim]:
    if setting in SETTINGS and setting != TABLE2_SETTING:
        return []
    whole = next(row for row in TABLE2 if row.method == "LMPO" and row.variant is None)
    return [
        Claim(
            2,
            f"LMPO wins more in Arena-Hard than LMPO, {row.label}",
            ARENA_HARD,
            "wr",
            (setting, "LMPO", None),
            (setting, row.method, row.variant),
            whole.wr - row.wr if setting == TABLE2_SETTING else None,
        )
        for row in TABLE2
        if row.variant is not None
    ]


def _table3(setting: str) -> list[Claim]:
    if setting in SETTINGS and setting != TABLE3_SETTING:
        return []
    low, high = TABLE3[0], TABLE3[-1]
    small, large = ((setting, "LMPO", lambda_variant(setting, row.value)) for row in (low, high))
    names = f"from λ = {low.value} to {high.value}"
    lc, length = (high.lc - low.lc, low.length - high.length) if setting == TABLE3_SETTING else (None, None)
    return [
        Claim(3, f"LC rises {names}", ALPACA_EVAL, "lc", large, small, lc),
        Claim(3, f"answers get shorter {names}", ALPACA_EVAL, "length", small, large, length),
    ]


def judge(claim: Claim, results: Results) -> Difference:
    """The claim's difference as measured."""
    if claim.value == "rank":
        return compare_ranks(results.ranks(claim.larger[0]), claim.larger[1], claim.smaller[1])
    return compare(results.row(claim.suite, claim.larger), results.row(claim.suite, claim.smaller), claim.value)
