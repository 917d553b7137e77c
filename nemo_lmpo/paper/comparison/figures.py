"""Pictures of a comparison: curves averaged over seeds, and the measures side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nemo_lmpo.paper.comparison.results import Values, estimate, of_variant
from nemo_lmpo.paper.comparison.suites import MEASURES, START, Suite, Variant
from nemo_lmpo.report.charts import LOGPS, Chart, Curve, Panel
from nemo_lmpo.report.escape import plot_text
from nemo_lmpo.report.plots import BACKGROUND, GRID, MUTED, ROLES, RUN_COLORS, TEXT, Picture, picture_bytes
from nemo_lmpo.report.read import VALIDATION, Metrics, Run, Series

MARGIN_METRIC = "logps/margin"

CURVES: dict[str, Chart] = {
    "logps": Chart(
        "logps",
        "Log-probabilities during training",
        "Mean log-probability of a response token: chosen above, rejected below. All runs see the same pairs in the "
        "same order. Lines: training batches; dots: held-out pairs.",
        LOGPS.panels,
    ),
    "margin": Chart(
        "margin",
        "Margin during training",
        "Chosen less rejected log-probability of a token: the same for all methods, unlike their rewards.",
        (Panel("margin (nats/token)", (Curve(MARGIN_METRIC, "margin", "margin"),), reference=(0.0, "no preference")),),
    ),
}


def average(label: str, metrics: Sequence[Metrics]) -> Run:
    """The mean over seeds as one run; steps that a seed does not have are left out."""
    series: dict[str, Series] = {}
    with_margin = [_with_margin(found) for found in metrics]
    for name in with_margin[0]:
        parts = [
            dict(zip(found[name].steps, found[name].values, strict=True)) for found in with_margin if name in found
        ]
        if len(parts) < len(metrics):
            continue
        steps = sorted(set.intersection(*(set(part) for part in parts)))
        series[name] = Series(steps, [math.fsum(part[step] for part in parts) / len(parts) for step in steps])
    return Run(label, Metrics(series, max(found.last_step for found in metrics)))


def _with_margin(metrics: Metrics) -> dict[str, Series]:
    series = dict(metrics.series)
    for prefix in ("", VALIDATION):
        chosen, rejected = series.get(f"{prefix}logps/chosen"), series.get(f"{prefix}logps/rejected")
        if chosen is not None and rejected is not None:
            other = dict(zip(rejected.steps, rejected.values, strict=True))
            both = [
                (step, value - other[step])
                for step, value in zip(chosen.steps, chosen.values, strict=True)
                if step in other
            ]
            series[f"{prefix}{MARGIN_METRIC}"] = Series([step for step, _ in both], [value for _, value in both])
    return series


def measure_picture(suite: Suite, values: Values) -> Picture | None:
    """Every measure of a suite as a row of dots with standard errors."""
    shown = [
        name
        for name in suite.measures
        if name != "chosen_change" and sum(bool(of_variant(values, one, name)) for one in suite.variants) > 1
    ]
    if not shown:
        return None
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    height = rows * (0.75 + 0.27 * len(suite.variants))
    figure = Figure(figsize=(3.1 * columns + 1.6, height), dpi=160, facecolor=BACKGROUND, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place < len(shown):
            _dots(axes, suite.variants, values, shown[place])
        else:
            axes.set_visible(False)
    caption = "Means over seeds with standard errors. The dashed line is the start model."
    return Picture(Chart(f"{suite.name}_measures", "Measures side by side", caption, ()), picture_bytes(canvas))


def _dots(axes: Any, variants: Sequence[Variant], values: Values, name: str) -> None:
    for row, variant in enumerate(variants):
        found = estimate(list(of_variant(values, variant, name).values()))
        if found is None:
            continue
        color = ROLES["neutral"] if variant == START else RUN_COLORS[0]
        axes.errorbar(
            found.mean, row, xerr=found.error, fmt="o", color=color, markersize=5, elinewidth=1.6, capsize=3, zorder=3
        )
        if variant == START:
            axes.axvline(found.mean, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)), zorder=1)
    axes.set_facecolor(BACKGROUND)
    axes.set_title(f"{MEASURES[name].label} ({MEASURES[name].unit.split(',')[0].split(' of ')[0]})", fontsize=9)
    axes.title.set_color(TEXT)
    axes.set_yticks(range(len(variants)), [plot_text(variant.label) for variant in variants])
    axes.set_ylim(len(variants) - 0.5, -0.5)
    axes.tick_params(colors=TEXT, labelsize=8.5, length=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    for side in axes.spines.values():
        side.set_visible(False)
