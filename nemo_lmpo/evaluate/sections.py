"""Sections of the page of tables: anchors, and each of the paper's tables with its claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nemo_lmpo.evaluate.blocks import Block, Details, Heading, Table, Text
from nemo_lmpo.evaluate.cells import (
    Footnotes,
    Judges,
    card,
    command_for,
    digits_of,
    format_value,
    general_errata,
    header_of,
    measured_cell,
    pairs,
)
from nemo_lmpo.evaluate.claims import Claim, Results, Row, claims_of, judge, lambda_variant
from nemo_lmpo.evaluate.comparisons import Difference, paper_tasks
from nemo_lmpo.evaluate.published import (
    TABLE1,
    TABLE1_COLUMNS,
    TABLE2,
    TABLE2_SETTING,
    TABLE3,
    TABLE3_SETTING,
    TABLE4,
)
from nemo_lmpo.evaluate.result import Result
from nemo_lmpo.evaluate.suites import ALPACA_EVAL, ARENA_HARD, COLUMNS, LEADERBOARD, METHODS, SETTINGS, TASKS, TITLES


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
    rows = []
    for result in sorted(anchors, key=lambda one: (one.suite, -one.model.published.get("wr", 0))):
        row = [f"{result.model.name}, {TITLES[result.suite]}"]
        for name in ("lc", "wr", "length"):
            there = result.model.published.get(name)
            row.append("" if there is None else f"{there:.{digits_of(name)}f}")
            row.append(measured_cell(result, name, judges, digits_of(name)))
        rows.append(row)
    header = ["", *(f"{name} {kind}" for name in ("LC %", "WR %", "length") for kind in ("published", "here"))]
    about = "Stored answers of models with published scores, judged here: how far today's judge is from the published."
    return [Heading(2, "Anchors"), Text(about), Table(header, rows)]


def table1(results: Results, judges: Judges) -> list[Block]:
    """LC, WR and lengths of all methods."""
    about = "AlpacaEval 2 and Arena-Hard v0.1 by setting and method. Brackets: 95 % by resampling instructions."
    blocks: list[Block] = [Heading(2, "Table 1: all methods"), Text(about)]
    claims = []
    for setting in results.settings():
        footnotes, rows, missing = Footnotes(1), [], []
        for method in METHODS:
            row: Row = (setting, method, None)
            found = {suite: results.row(suite, row) for suite in (ALPACA_EVAL, ARENA_HARD)}
            mark = _mark(footnotes, setting, method)
            published = TABLE1.get((setting, method), {})
            if published or any(found.values()):
                rows.append([method, *pairs(TABLE1_COLUMNS, published, found.__getitem__, mark, judges)])
                missing += [command_for(suite, row) for suite, result in found.items() if result is None]
        claims += [claim for claim in claims_of(setting) if claim.table == 1]
        if rows:
            title = SETTINGS.get(setting, f"{setting} (not a setting of the paper)")
            blocks += card(title, header_of(TABLE1_COLUMNS), rows, footnotes.notes(), missing)
    return [*blocks, *general_errata(1), *_verdicts(claims, results)]


def _mark(footnotes: Footnotes, setting: str, method: str) -> Callable[[str], str]:
    return lambda column: footnotes.mark(setting, method, column)


def table2(results: Results, judges: Judges) -> list[Block]:
    """LMPO with parts taken away or replaced."""
    about = "Arena-Hard v0.1 with LMPO's parts taken away or replaced; published brackets resample battles."
    blocks: list[Block] = [Heading(2, "Table 2: ablations"), Text(about)]
    claims = []
    for setting in (TABLE2_SETTING, *(name for name in results.settings() if name not in SETTINGS)):
        ours, rows, missing, measured = setting == TABLE2_SETTING, [], [], False
        for ablation in TABLE2:
            row: Row = (setting, ablation.method, ablation.variant)
            result = results.row(ARENA_HARD, row)
            measured = measured or result is not None
            there = f"{ablation.wr:.1f} [{ablation.low:.1f}, {ablation.high:.1f}]" if ours else ""
            cells = [there, measured_cell(result, "wr", judges, 1)]
            cells += [f"{ablation.length:.0f}" if ours else "", measured_cell(result, "length", judges, 0)]
            rows.append([ablation.label, *cells])
            missing += [command_for(ARENA_HARD, row)] if result is None else []
        if ours or measured:
            header = header_of(("arena_wr", "arena_length"))
            blocks += card(SETTINGS.get(setting, setting), header, rows, [], missing)
            claims += [claim for claim in claims_of(setting) if claim.table == 2]
    return [*blocks, *general_errata(2), *_verdicts(claims, results)]


def table3(results: Results, judges: Judges) -> list[Block]:
    """LMPO under three values of lambda."""
    blocks: list[Block] = [Heading(2, "Table 3: the weight of the margin"), Text("AlpacaEval 2 for three values of λ.")]
    claims = []
    columns = ("lc", "wr", "length")
    for setting in (TABLE3_SETTING, *(name for name in results.settings() if name not in SETTINGS)):
        ours, rows, missing, measured = setting == TABLE3_SETTING, [], [], False
        for line in TABLE3:
            row: Row = (setting, "LMPO", lambda_variant(setting, line.value))
            result = results.row(ALPACA_EVAL, row)
            measured = measured or result is not None
            published = {"lc": line.lc, "wr": line.wr, "length": line.length} if ours else {}
            rows.append([f"λ = {line.value}", *pairs(columns, published, _always(result), lambda _: "", judges)])
            missing += [command_for(ALPACA_EVAL, row)] if result is None else []
        if ours or measured:
            blocks += card(SETTINGS.get(setting, setting), header_of(columns), rows, [], missing)
            claims += [claim for claim in claims_of(setting) if claim.table == 3]
    return [*blocks, *_verdicts(claims, results)]


def _always(result: Result | None) -> Callable[[str], Result | None]:
    return lambda suite: result


def table4(results: Results, judges: Judges) -> list[Block]:
    """The ten tasks, and average ranks."""
    about = (
        "Ten tasks of the Open LLM Leaderboard, published above measured; ranks are among the methods shown. No judge "
        "is involved, so cells can be compared, as far as versions of harness and tasks are the same."
    )
    blocks: list[Block] = [Heading(2, "Table 4: ten tasks"), Text(about)]
    claims = []
    for setting in results.settings():
        footnotes, rows, missing = Footnotes(4), [], []
        ranks = results.ranks(setting)
        for method in METHODS:
            row: Row = (setting, method, None)
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
        claims += [claim for claim in claims_of(setting) if claim.table == 4]
        if rows:
            header = ["", *COLUMNS, "average rank"]
            blocks += card(SETTINGS.get(setting, setting), header, rows, footnotes.notes(), missing)
    return [*blocks, *_both_ways(results), *general_errata(4), *_verdicts(claims, results)]


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


def _verdicts(claims: Sequence[Claim], results: Results) -> list[Block]:
    """The claims of a table, and which of the paper's were not measured."""
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
