"""Cells of the page of tables: numbers with intervals, marks of errata, and commands for what is missing."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence

from nemo_lmpo.evaluate.blocks import Block, Details, Table, Text
from nemo_lmpo.evaluate.claims import Row
from nemo_lmpo.evaluate.published import ERRATA
from nemo_lmpo.evaluate.result import Judge, Result, Value
from nemo_lmpo.evaluate.suites import ALPACA_EVAL, ARENA_HARD, LEADERBOARD, TITLES

PLACES = {
    "lc": (ALPACA_EVAL, "lc", "LC %"),
    "wr": (ALPACA_EVAL, "wr", "WR %"),
    "length": (ALPACA_EVAL, "length", "characters"),
    "arena_wr": (ARENA_HARD, "wr", "Arena-Hard WR %"),
    "arena_length": (ARENA_HARD, "length", "tokens"),
}
"""Columns of Table 1: suite, value, title."""
_MARKS = "ᵃᵇᶜᵈᵉᶠᵍʰ"


class Judges:
    """Letters for judges, so that cells say which numbers may be compared."""

    def __init__(self, results: Sequence[Result]) -> None:
        self._by_suite: dict[str, list[Judge]] = {}
        for result in results:
            if result.judge is not None:
                known = self._by_suite.setdefault(result.suite, [])
                if result.judge.identity not in [judge.identity for judge in known]:
                    known.append(result.judge)

    def letter(self, result: Result) -> str:
        """Empty where the suite has one judge only."""
        known = [judge.identity for judge in self._by_suite.get(result.suite, [])]
        if result.judge is None or len(known) < 2:
            return ""
        return string.ascii_uppercase[known.index(result.judge.identity) % 26]

    def lines(self) -> list[str]:
        """Who judged what, and what the letters mean."""
        return [
            f"{TITLES[suite]} was judged here by {'; '.join(self._name(known, place) for place in range(len(known)))}."
            for suite, known in self._by_suite.items()
        ]

    @staticmethod
    def _name(known: Sequence[Judge], place: int) -> str:
        judge = known[place]
        letter = f"{string.ascii_uppercase[place % 26]}: " if len(known) > 1 else ""
        return f"{letter}{judge.asked} (answered as {', '.join(judge.answered)}; prompt {judge.prompt[:40]})"


def format_value(value: Value | None, digits: int = 1) -> str:
    """Number, and below it the interval by instruction."""
    if value is None:
        return ""
    text = f"{value.value:.{digits}f}"
    return f"{text}\n[{value.honest[0]:.{digits}f},\u00a0{value.honest[1]:.{digits}f}]" if value.honest else text


def digits_of(column: str) -> int:
    """Lengths are whole numbers."""
    return 0 if "length" in column else 1


def measured_cell(result: Result | None, value: str, judges: Judges, digits: int) -> str:
    """Number, interval, judge if there are several, and the count of a trial."""
    if result is None or value not in result.values:
        return ""
    judged = result.suite != LEADERBOARD and value != "length"
    trial = "" if result.whole else f"n = {result.n}"
    more = " ".join(filter(None, (judges.letter(result) if judged else "", trial)))
    return format_value(result.values[value], digits) + (f"\n{more}" if more else "")


class Footnotes:
    """Errata at their cells."""

    def __init__(self, table: int) -> None:
        self._errata = [erratum for erratum in ERRATA if erratum.table == table]
        self._used: list[str] = []

    def mark(self, setting: str, method: str, column: str) -> str:
        """A mark behind a published cell that something is wrong with."""
        for erratum in self._errata:
            if erratum.setting == setting and method in erratum.methods and column in erratum.columns:
                if erratum.text not in self._used:
                    self._used.append(erratum.text)
                return _MARKS[self._used.index(erratum.text)]
        return ""

    def notes(self) -> list[str]:
        """Explanations of the marks used."""
        return [f"{_MARKS[place]} {text}" for place, text in enumerate(self._used)]


def general_errata(table: int) -> list[Block]:
    """What is about no cell in particular."""
    return [Text(f"Erratum: {erratum.text}") for erratum in ERRATA if erratum.table == table and not erratum.methods]


def card(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    missing: Sequence[str],
) -> list[Block]:
    """A table and the commands that fill its empty cells."""
    kept = kept_columns(header, rows)
    rows = [[row[place] for place in kept] for row in rows]
    blocks: list[Block] = [Table([header[place] for place in kept], rows, notes=notes, title=title)]
    if missing:
        blocks.append(Details(f"{len(missing)} commands fill the empty cells", missing))
    return blocks


def kept_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """All but published columns without numbers, and their neighbors that have none either: other settings' tables."""
    empty = [all(not row[place] for row in rows) for place in range(len(header))]
    unpublished = [place for place, title in enumerate(header) if title.endswith(" published") and empty[place]]
    dropped = {*unpublished, *(place + 1 for place in unpublished if empty[place + 1])}
    return [place for place in range(len(header)) if place not in dropped]


def command_for(suite: str, row: Row) -> str:
    """The command whose result fills a row."""
    setting, method, variant = row
    name = "_".join(filter(None, (method.lower(), setting, variant))).replace("=", "_")
    judge = " --judge-endpoint URL" if suite != LEADERBOARD else ""
    return (
        f"python -m nemo_lmpo.evaluate {suite} --model runs/{name} --row {'/'.join(filter(None, row))}{judge} "
        f"--output evals/{name}"
    )


def pairs(
    columns: Sequence[str],
    published: Mapping[str, float],
    find: Callable[[str], Result | None],
    mark: Callable[[str], str],
    judges: Judges,
) -> list[str]:
    """Published and measured cell of each column."""
    cells = []
    for column in columns:
        suite, value, _ = PLACES[column]
        there = published.get(column)
        cells.append("" if there is None else f"{there:.{digits_of(column)}f}{mark(column)}")
        cells.append(measured_cell(find(suite), value, judges, digits_of(column)))
    return cells


def header_of(columns: Sequence[str]) -> list[str]:
    """Titles of the published and the measured column of each."""
    return ["", *(f"{PLACES[column][2]} {kind}" for column in columns for kind in ("published", "here"))]
