"""Cells of the page of tables: numbers with intervals, marks of errata, and commands for what is missing."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_lmpo.evaluate.result import Judge, Result, Value
from nemo_lmpo.evaluate.suites import LEADERBOARD, TITLES
from nemo_lmpo.paper.tables.claims import PLACES, TableRow
from nemo_lmpo.paper.tables.published import ERRATA
from nemo_lmpo.report.blocks import Block, Details, Table, Text

_MARKS = "ᵃᵇᶜᵈᵉᶠᵍʰ"


class Judges:
    """Letters for judges, so that cells say which numbers may be compared."""

    def __init__(self, results: Sequence[Result]) -> None:
        self._known: dict[str, dict[Any, tuple[str, Judge]]] = {}
        for judge, suite in ((result.judge, result.suite) for result in results if result.judge is not None):
            known = self._known.setdefault(suite, {})
            known.setdefault(judge.identity, (string.ascii_uppercase[len(known) % 26], judge))

    def letter(self, result: Result) -> str:
        """Empty where the suite has one judge only."""
        known = self._known.get(result.suite, {})
        return known[result.judge.identity][0] if result.judge is not None and len(known) > 1 else ""

    def lines(self) -> list[str]:
        """Who judged what, and what the letters mean."""
        lines = []
        for suite, known in self._known.items():
            names = [
                f"{f'{letter}: ' if len(known) > 1 else ''}{judge.asked} (answered as {', '.join(judge.answered)}; "
                f"prompt {judge.prompt[:40]})"
                for letter, judge in known.values()
            ]
            lines.append(f"{TITLES[suite]} was judged here by {'; '.join(names)}.")
        return lines


def format_value(value: Value | None, digits: int = 1) -> str:
    """Number, and below it the interval by instruction."""
    if value is None:
        return ""
    text = f"{value.value:.{digits}f}"
    return (
        f"{text}\n[{value.bootstrap_interval[0]:.{digits}f},\u00a0{value.bootstrap_interval[1]:.{digits}f}]"
        if value.bootstrap_interval
        else text
    )


def digits_of(column: str) -> int:
    """Lengths are whole numbers."""
    return 0 if "length" in column else 1


def published_cells(numbers: Mapping[str, float]) -> dict[str, str]:
    """Published numbers by column as they are shown."""
    return {column: f"{number:.{digits_of(column)}f}" for column, number in numbers.items()}


def measured_cell(result: Result | None, value: str, judges: Judges) -> str:
    """Number, interval, judge if there are several, and the count of a trial."""
    if result is None or value not in result.values:
        return ""
    judged = result.suite != LEADERBOARD and value != "length"
    trial = "" if result.whole else f"n = {result.n}"
    more = " ".join(filter(None, (judges.letter(result) if judged else "", trial)))
    return format_value(result.values[value], digits_of(value)) + (f"\n{more}" if more else "")


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


def command_for(suite: str, row: TableRow) -> str:
    """The command whose result fills a row."""
    setting, method, variant = row
    name = "_".join(filter(None, (method.lower(), setting, variant))).replace("=", "_")
    judge = " --judge-endpoint URL" if suite != LEADERBOARD else ""
    return (
        f"python -m nemo_lmpo.evaluate {suite} --model runs/{name} --row {'/'.join(filter(None, row))}{judge} "
        f"--output evals/{name}"
    )


def pairs(
    columns: Sequence[str], published: Mapping[str, str], found: Mapping[str, Result | None], judges: Judges
) -> list[str]:
    """Published and measured cell of each column; results by suite."""
    cells = []
    for column in columns:
        suite, value, _ = PLACES[column]
        cells += [published.get(column, ""), measured_cell(found[suite], value, judges)]
    return cells


def header_of(columns: Sequence[str]) -> list[str]:
    """Titles of the published and the measured column of each."""
    return ["", *(f"{PLACES[column][2]} {kind}" for column in columns for kind in ("published", "here"))]
