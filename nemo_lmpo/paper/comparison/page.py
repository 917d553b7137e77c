"""The page of a comparison: Markdown with pictures beside it, and HTML with the pictures inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_lmpo.paper.comparison.results import Estimate, Judgement, Values, estimate, judge, of_variant
from nemo_lmpo.paper.comparison.scales import Scale
from nemo_lmpo.paper.comparison.suites import MEASURES, Suite, Variant
from nemo_lmpo.report.blocks import Block, Code, Figure, Heading, Points, Table, Text, to_html, to_markdown
from nemo_lmpo.report.read import Metrics
from nemo_lmpo.runtime.files import replace_file

if TYPE_CHECKING:
    from nemo_lmpo.report.plots import Picture

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


def pictures_of(suite: Suite, comparison: Comparison) -> list[Picture]:
    """The suite's pictures."""
    from nemo_lmpo.paper.comparison.figures import CURVES, average, measure_picture
    from nemo_lmpo.report.plots import draw_all

    runs = []
    for variant in suite.variants:
        metrics = [found for (who, _), found in comparison.metrics.items() if who == variant]
        if metrics and max(one.last_step for one in metrics) > 1:
            runs.append(average(variant.label, metrics))
    drawn = draw_all(runs, [replace(CURVES[name], name=f"{suite.name}_{name}") for name in suite.curves])
    measured = measure_picture(suite, comparison.values)
    return drawn if measured is None else [*drawn, measured]


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


def page_blocks(comparison: Comparison, figures: Mapping[str, Sequence[Picture]]) -> list[Block]:
    """The whole page; pictures by the name of their suite."""
    blocks: list[Block] = [Heading(1, title_of(comparison)), *map(Text, _about(comparison)), Code(comparison.command)]
    for suite in comparison.suites:
        header, rows = table_of(suite, comparison)
        blocks += [Heading(2, suite.title), Text(suite.about), Table(header, rows)]
        if claims := claim_rows(suite, comparison):
            blocks.append(Table(("the paper says", "where", "this run", "numbers"), claims, style="claims"))
        blocks += [
            Figure(one.chart.title, one.chart.caption, one.png, path_of(one)) for one in figures.get(suite.name, ())
        ]
    used = {name for suite in comparison.suites for name in suite.measures}
    measures = [f"{measure.label}: {measure.unit}" for name, measure in MEASURES.items() if name in used]
    recipes = [(variant.label, text) for variant, text in comparison.settings.items()]
    blocks += [Heading(2, "Measures"), Points(measures)]
    blocks += [Heading(2, "Runs"), Table(("", "recipe"), recipes, style="texts")]
    answers = [
        (variant.label, example["prompt"], example["answer"])
        for variant, examples in comparison.examples.items()
        for example in examples[:2]
    ]
    if answers:
        blocks += [Heading(2, "Answers"), Table(("", "prompt", "greedy answer"), answers, style="texts")]
    return blocks


def title_of(comparison: Comparison) -> str:
    """The page's title."""
    return f"Comparison at scale {comparison.scale.name}"


def path_of(picture: Picture) -> str:
    """Of a picture's file, from the page's folder."""
    return f"{FIGURES_DIR}/{picture.chart.name}.png"


def write_page(comparison: Comparison, directory: Path) -> Path:
    """Write `comparison.html`, `comparison.md` and `figures/`; returns the first."""
    figures = {suite.name: pictures_of(suite, comparison) for suite in comparison.suites}
    (directory / FIGURES_DIR).mkdir(parents=True, exist_ok=True)
    for picture in (one for found in figures.values() for one in found):
        replace_file(directory / path_of(picture), picture.png)
    blocks = page_blocks(comparison, figures)
    replace_file(directory / "comparison.md", to_markdown(blocks))
    page = directory / "comparison.html"
    replace_file(page, to_html(title_of(comparison), blocks))
    return page
