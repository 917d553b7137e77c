"""The page of a comparison, as HTML with the pictures inside and as Markdown with pictures beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_lmpo.compare.results import Estimate, Judgement, Values, estimate, judge, of_variant
from nemo_lmpo.compare.scales import Scale
from nemo_lmpo.compare.suites import MEASURES, Suite, Variant
from nemo_lmpo.report import html
from nemo_lmpo.report.read import Metrics

FIGURES_DIR = "figures"


@dataclass(frozen=True)
class Comparison:
    """Everything that a page says."""

    scale: Scale
    suites: Sequence[Suite]
    seeds: int
    command: str
    values: Values
    metrics: Mapping[tuple[Variant, int], Metrics]
    settings: Mapping[Variant, str]
    """How each variant's recipe was called."""
    examples: Mapping[Variant, Sequence[Mapping[str, str]]] = field(default_factory=dict)
    machine: str = ""
    missing: Sequence[str] = ()
    """Runs without a result."""


@dataclass(frozen=True)
class Figure:
    """A picture in both themes."""

    name: str
    title: str
    caption: str
    light: bytes
    dark: bytes
    wide: bool = False


def format_estimate(found: Estimate | None, measure: str) -> str:
    """Mean ± standard error in the measure's digits."""
    if found is None:
        return "-"
    digits = MEASURES[measure].digits
    text = f"{found.mean:.{digits}f}"
    return text if found.error is None else f"{text} ± {found.error:.{digits}f}"


def table_of(suite: Suite, comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows; measures that no run has are left out."""
    values = comparison.values
    names = [name for name in suite.measures if any(of_variant(values, variant, name) for variant in suite.variants)]
    rows = [
        [
            variant.label,
            *(format_estimate(estimate(list(of_variant(values, variant, name).values())), name) for name in names),
        ]
        for variant in suite.variants
    ]
    return ["", *(MEASURES[name].label for name in names)], rows


def claim_rows(suite: Suite, comparison: Comparison) -> list[list[str]]:
    """Each claim with its verdict and the numbers; what only the generated task can tell is left out elsewhere."""
    judged = [judge(claim, comparison.values) for claim in suite.claims]
    return [_claim_row(one) for one in judged if one.difference is not None or one.claim.measure != "right"]


def _claim_row(judgement: Judgement) -> list[str]:
    claim = judgement.claim
    name = claim.measure
    if judgement.difference is None:
        numbers = "no numbers"
    else:
        numbers = (
            f"{MEASURES[name].label}: {claim.high.label} {format_estimate(judgement.high, name)}, "
            f"{claim.low.label} {format_estimate(judgement.low, name)}; "
            f"difference {format_estimate(judgement.difference, name)}"
        )
    return [claim.text, claim.source, judgement.verdict, numbers]


def figures_of(suite: Suite, comparison: Comparison) -> list[Figure]:
    """The suite's pictures."""
    from nemo_lmpo.compare.figures import CURVES, average, curve_pictures, measure_pictures

    found = []
    runs = []
    for variant in suite.variants:
        metrics = [found for (who, _), found in comparison.metrics.items() if who == variant]
        if metrics and max(one.last_step for one in metrics) > 1:
            runs.append(average(variant.label, metrics))
    for name in suite.curves:
        pictures = curve_pictures(CURVES[name], runs)
        if pictures is not None:
            chart = CURVES[name]
            found.append(Figure(f"{suite.name}_{name}", chart.title, chart.caption, *pictures))
    pictures = measure_pictures(suite, comparison.values)
    if pictures is not None:
        caption = "Means over seeds with standard errors. The dashed line is the start model."
        found.append(Figure(f"{suite.name}_measures", "Measures side by side", caption, *pictures, wide=True))
    return found


def _about(comparison: Comparison) -> list[str]:
    several = comparison.seeds > 1
    lines = [
        comparison.scale.about,
        f"{comparison.seeds} seed{'s' if several else ''}: "
        + (
            "orders of the data, from one and the same start model. Numbers are means ± standard errors over seeds."
            if several
            else "numbers have no standard error, so no claim about a difference can be decided."
        ),
        "A claim is shown (contradicted) if the 95 % confidence interval of the paired difference over seeds, by "
        "Student's t, lies on its side of zero (on the other). Many claims are tested at once, so one in twenty "
        "verdicts would come out by chance.",
    ]
    if comparison.machine:
        lines.append(f"Made on {comparison.machine}.")
    if comparison.missing:
        lines.append(f"Without a result: {', '.join(comparison.missing)}.")
    return lines


def _measure_notes(suites: Sequence[Suite], comparison: Comparison) -> list[str]:
    used = {name for suite in suites for name in suite.measures}
    return [f"{measure.label}: {measure.unit}" for name, measure in MEASURES.items() if name in used]


def build_html(comparison: Comparison, figures: Mapping[str, Sequence[Figure]]) -> str:
    """The self-contained page."""
    title = f"Comparison at scale {comparison.scale.name}"
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(line)}</p>" for line in _about(comparison))]
    parts.append(f"<pre>{html.escape(comparison.command)}</pre>")
    for suite in comparison.suites:
        header, rows = table_of(suite, comparison)
        claims = claim_rows(suite, comparison)
        parts.append(f"<h2>{html.escape(suite.title)}</h2><p>{html.escape(suite.about)}</p>")
        parts.append(f'<section class="card">{html.table(rows, header=header, kind="numbers")}</section><br>')
        if claims:
            table = html.table(claims, header=("the paper says", "where", "this run", "numbers"), kind="claims")
            parts.append(f'<section class="card">{table}</section><br>')
        narrow, wide = (
            "".join(
                html.figure(one.title, one.caption, one.light, one.dark)
                for one in figures[suite.name]
                if one.wide == wide
            )
            for wide in (False, True)
        )
        parts.append(f'<div class="curves">{narrow}</div><br>{wide}')
    parts.append(_closing_html(comparison))
    return html.document(title, "\n".join(parts))


def _closing_html(comparison: Comparison) -> str:
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in _measure_notes(comparison.suites, comparison))
    recipes = [[variant.label, text] for variant, text in comparison.settings.items()]
    answers = [
        [variant.label, example["prompt"], example["answer"]]
        for variant, examples in comparison.examples.items()
        for example in examples[:2]
    ]
    shown = html.table(answers, header=("", "prompt", "greedy answer"), kind="settings") if answers else ""
    return (
        f'<h2>Measures</h2><ul class="notes">{notes}</ul><h2>Runs</h2>'
        f'<section class="card">{html.table(recipes, kind="settings")}</section>'
        + (f'<h2>Answers</h2><section class="card">{shown}</section>' if answers else "")
    )


def build_markdown(comparison: Comparison, figures: Mapping[str, Sequence[Figure]]) -> str:
    """The page for repositories and terminals."""
    lines = [f"# Comparison at scale {comparison.scale.name}", ""]
    for paragraph in _about(comparison):
        lines += [paragraph, ""]
    lines += ["```", comparison.command, "```", ""]
    for suite in comparison.suites:
        lines += [f"## {suite.title}", "", suite.about, ""]
        lines += [*_markdown_table(*table_of(suite, comparison)), ""]
        claims = claim_rows(suite, comparison)
        if claims:
            lines += [*_markdown_table(["the paper says", "where", "this run", "numbers"], claims), ""]
        for one in figures[suite.name]:
            lines += [f"![{one.title}]({FIGURES_DIR}/{one.name}.png)", ""]
    lines += ["## Measures", "", *(f"- {note}" for note in _measure_notes(comparison.suites, comparison)), ""]
    return "\n".join(lines)


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    escaped = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *escaped)]


def write_page(comparison: Comparison, directory: Path) -> Path:
    """Write `comparison.html`, `comparison.md` and `figures/`; returns the first."""
    figures = {suite.name: figures_of(suite, comparison) for suite in comparison.suites}
    folder = directory / FIGURES_DIR
    folder.mkdir(parents=True, exist_ok=True)
    for found in figures.values():
        for one in found:
            (folder / f"{one.name}.png").write_bytes(one.light)
    page = directory / "comparison.html"
    page.write_text(build_html(comparison, figures), encoding="utf-8")
    (directory / "comparison.md").write_text(build_markdown(comparison, figures), encoding="utf-8")
    return page
