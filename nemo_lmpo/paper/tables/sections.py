"""Sections of the page of tables: anchors, and each of the paper's tables with its claims."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from nemo_lmpo.evaluate.result import Result
from nemo_lmpo.evaluate.suites import COLUMNS, LEADERBOARD, METHODS, SETTINGS, TASKS, TITLES, lambda_variant
from nemo_lmpo.paper.tables.cells import (
    Footnotes,
    Judges,
    card,
    command_for,
    format_value,
    general_errata,
    header_of,
    pairs,
    published_cells,
)
from nemo_lmpo.paper.tables.claims import PLACES, Results, TableRow, claims_of, judge
from nemo_lmpo.paper.tables.differences import Difference, paper_tasks
from nemo_lmpo.paper.tables.published import (
    TABLE1,
    TABLE1_COLUMNS,
    TABLE2,
    TABLE2_SETTING,
    TABLE3,
    TABLE3_COLUMNS,
    TABLE3_SETTING,
    TABLE4,
)
from nemo_lmpo.report.blocks import Block, Details, Heading, Table, Text


def anchors(results: Results, judges: Judges) -> list[Block]:
    """Models whose published numbers are known, under the same judge: they show how the judge differs."""
    anchors = [result for result in results.all if result.model.kind == "anchor"]
    if not anchors:
        text = (
            "None measured. Models with stored answers and published scores show how today's judge differs from the "
            "published one: python -m nemo_lmpo.evaluate alpaca_eval --anchor Mistral-7B-Instruct-v0.2 "
            "--judge-endpoint URL"
        )
        return [Heading(2, "Anchors"), Text(text)]
    rows = [
        [
            f"{result.model.name}, {TITLES[result.suite]}",
            *pairs(TABLE3_COLUMNS, published_cells(result.model.published), dict.fromkeys(TITLES, result), judges),
        ]
        for result in sorted(anchors, key=lambda one: (one.suite, -one.model.published.get("wr", 0)))
    ]
    header = ["", *(f"{name} {kind}" for name in ("LC %", "WR %", "length") for kind in ("published", "here"))]
    about = "Stored answers of models with published scores, judged here: how far today's judge is from the published."
    return [Heading(2, "Anchors"), Text(about), Table(header, rows)]


class Line(NamedTuple):
    """A line of a table: what it is called, which results fill it, and the published cells by column."""

    label: str
    row: TableRow
    published: Mapping[str, str]


def table1(results: Results, judges: Judges) -> list[Block]:
    """LC, WR and lengths of all methods."""
    about = "AlpacaEval 2 and Arena-Hard v0.1 by setting and method. Brackets: 95 % by resampling instructions."

    def lines(setting: str, footnotes: Footnotes) -> Iterator[Line]:
        for method in METHODS:
            cells = published_cells(TABLE1.get((setting, method), {}))
            marked = {column: cell + footnotes.mark(setting, method, column) for column, cell in cells.items()}
            yield Line(method, (setting, method, None), marked)

    table = _table(1, TABLE1_COLUMNS, results.settings(), lines, results, judges)
    return [Heading(2, "Table 1: all methods"), Text(about), *table]


def table2(results: Results, judges: Judges) -> list[Block]:
    """LMPO with parts taken away or replaced."""
    about = "Arena-Hard v0.1 with LMPO's parts taken away or replaced; published brackets resample battles."

    def lines(setting: str, _: Footnotes) -> Iterator[Line]:
        for one in TABLE2:
            wr = f"{one.wr:.1f} [{one.low:.1f}, {one.high:.1f}]"
            published = {"arena_wr": wr, "arena_length": f"{one.length:.0f}"}
            yield Line(one.label, (setting, one.method, one.variant), published)

    settings = [TABLE2_SETTING, *results.other_settings()]
    table = _table(2, ("arena_wr", "arena_length"), settings, lines, results, judges)
    return [Heading(2, "Table 2: ablations"), Text(about), *table]


def table3(results: Results, judges: Judges) -> list[Block]:
    """LMPO under three values of lambda."""

    def lines(setting: str, _: Footnotes) -> Iterator[Line]:
        for one in TABLE3:
            published = published_cells({"lc": one.lc, "wr": one.wr, "length": one.length})
            yield Line(f"λ = {one.value}", (setting, "LMPO", lambda_variant(setting, one.value)), published)

    settings = [TABLE3_SETTING, *results.other_settings()]
    table = _table(3, TABLE3_COLUMNS, settings, lines, results, judges)
    return [Heading(2, "Table 3: the weight of the margin"), Text("AlpacaEval 2 for three values of λ."), *table]


def _table(
    number: int,
    columns: Sequence[str],
    settings: Sequence[str],
    lines_of: Callable[[str, Footnotes], Iterator[Line]],
    results: Results,
    judges: Judges,
) -> list[Block]:
    """A card for each setting that the paper or a result has numbers of; then what is wrong, and the claims."""
    blocks: list[Block] = []
    suites = dict.fromkeys(PLACES[column][0] for column in columns)
    for setting in settings:
        footnotes, rows, missing, filled = Footnotes(number), [], [], False
        for label, row, cells in lines_of(setting, footnotes):
            published = cells if setting in SETTINGS else {}
            found = {suite: results.row(suite, row) for suite in suites}
            here = bool(published) or any(found.values())
            filled = filled or here
            if here or number != 1:  # lines of the other tables are read together
                rows.append([label, *pairs(columns, published, found, judges)])
                missing += [command_for(suite, row) for suite, result in found.items() if result is None]
        if filled:
            title = SETTINGS.get(setting, f"{setting} (not a setting of the paper)" if number == 1 else setting)
            blocks += card(title, header_of(columns), rows, footnotes.notes(), missing)
    return [*blocks, *general_errata(number), *_verdicts(number, settings, results)]


def table4(results: Results, judges: Judges) -> list[Block]:
    """The ten tasks, and average ranks."""
    about = (
        "Ten tasks of the Open LLM Leaderboard, published above measured; ranks are among the methods shown. No judge "
        "is involved, so cells can be compared, as far as versions of harness and tasks are the same."
    )
    blocks: list[Block] = [Heading(2, "Table 4: ten tasks"), Text(about)]
    for setting in results.settings():
        footnotes, rows, missing = Footnotes(4), [], []
        ranks = results.ranks(setting)
        for method in METHODS:
            row: TableRow = (setting, method, None)
            published = TABLE4.get((setting, method))
            result = results.row(LEADERBOARD, row)
            if published is not None:
                mark = footnotes.mark(setting, method, "rank")
                rank = f"{published['rank']:.1f}{mark}"
                again = f" ({published['rank recomputed']:.1f})" if mark else ""
                rows.append([f"{method} published", *(f"{published[name]:.2f}" for name in COLUMNS), rank + again])
            if result is not None:
                rank = f"{ranks.mean[method]:.1f}" if ranks is not None and method in ranks.mean else ""
                rows.append([f"{method} here", *_task_cells(result, judges), rank])
            elif published is not None:
                missing.append(command_for(LEADERBOARD, row))
        if rows:
            header = ["", *COLUMNS, "average rank"]
            blocks += card(SETTINGS.get(setting, setting), header, rows, footnotes.notes(), missing)
    return [*blocks, *_both_ways(results), *general_errata(4), *_verdicts(4, results.settings(), results)]


def _task_cells(result: Result, judges: Judges) -> list[str]:
    names = paper_tasks(result)
    cells = []
    for column in COLUMNS:
        value = result.values.get(names.get(column, ""))
        error = f" ± {value.standard_error:.1f}" if value is not None and value.standard_error is not None else ""
        cells.append("" if value is None else f"{value.value:.2f}{error}")
    return cells


def _both_ways(results: Results) -> list[Block]:
    """Columns that are run in two ways."""
    twice = [task for task in TASKS if sum(other.column == task.column for other in TASKS) > 1]
    rows = [
        [f"{result.model.name}", *(format_value(result.values.get(task.name)) for task in twice)]
        for result in results.all
        if result.suite == LEADERBOARD
    ]
    if not rows:
        return []
    header = ["", *(f"{task.column} {task.note}" for task in twice)]
    return [Table(header, rows, title="Tasks that depend on how they are run")]


def _verdicts(table: int, settings: Sequence[str], results: Results) -> list[Block]:
    """The claims of a table, and which of the paper's were not measured."""
    claims = [claim for setting in settings for claim in claims_of(setting) if claim.table == table]
    rows, missing = [], []
    for claim in claims:
        found = judge(claim, results)
        setting = SETTINGS.get(claim.larger[0], claim.larger[0])
        if found.interval is not None:
            there = "" if claim.published is None else f"{claim.published:.1f}"
            rows.append([claim.text, setting, found.verdict, there, format_difference(found, claim.value)])
        elif claim.larger[0] in SETTINGS:
            missing.append(f"{claim.text} ({setting}): {found.reason}")
    blocks: list[Block] = []
    if rows:
        header = ("the paper says", "setting", "verdict here", "difference published", "difference here")
        blocks.append(Table(header, rows, style="claims", title="Claims"))
    if missing:
        blocks.append(Details(f"{len(missing)} claims without numbers", missing))
    return blocks


def format_difference(found: Difference, value: str) -> str:
    """Difference, its interval, and on how much it rests; or why there is none."""
    if found.interval is None or found.value is None:
        return found.reason
    digits = 0 if value == "length" else 2
    return (
        f"{found.value:+.{digits}f} [{found.interval.low:+.{digits}f}, {found.interval.high:+.{digits}f}], "
        f"{found.pairs} {'tasks' if value == 'rank' else 'instructions'}"
    )
