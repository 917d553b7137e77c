"""Draw charts of one run, or of several for comparison, as PNG pictures.

A faint line has every step, a strong one a Gaussian average that does not lag, dots are validation. Colours
are those of Okabe and Ito, which people with any colour vision can tell apart. Figures are drawn without
pyplot: nothing is global, and any thread may draw.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

from nemo_lmpo.report.charts import CHARTS, Chart, Curve, Panel
from nemo_lmpo.report.escape import plot_text
from nemo_lmpo.report.read import VALIDATION, Run, Series

_WIDTH_INCHES = 5.6
_PANEL_INCHES = {1: 2.35, 2: 1.95}
_LOW_PANEL_INCHES = 1.6
_FRAME_INCHES = 0.75
_DPI = 180
# Few colours are in a picture; a palette of so many loses nothing the eye sees and halves the page.
_PALETTE = 128
# Room for legends, and about what a letter and a legend's handle take of it.
_LEGEND_INCHES, _LETTER_INCHES, _HANDLE_INCHES = 4.8, 0.068, 0.42
_LABEL_LETTERS = 44
# Values this many times the usual range (1st to 99th percentile) away from it are left out of a panel.
_EXTREME_SPREADS = 3.0

# With fewer steps than this a line is easy to follow as it is.
_SMOOTH_FROM_STEPS = 25
# The average's standard deviation: a part of the run, but never many steps, which would be slow to compute.
_SMOOTH_FRACTION, _SMOOTH_MOST_STEPS = 0.02, 200.0


BACKGROUND, TEXT, MUTED, GRID = "#ffffff", "#1f2328", "#59636e", "#e4e8ec"
ROLES = {
    "chosen": "#0072b2",
    "rejected": "#d55e00",
    "margin": "#00805d",
    "accuracy": "#aa4a80",
    "loss": "#6a51a3",
    "neutral": "#4d5560",
}
RUN_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#1f2328")

_LINE_STYLES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)))


@dataclass(frozen=True)
class Picture:
    """A drawn chart."""

    chart: Chart
    png: bytes


def smoothing_sigma(points: int) -> float:
    """Standard deviation, in steps, of the average over a line of that many points; 0 for none."""
    return 0.0 if points < _SMOOTH_FROM_STEPS else min(max(1.0, points * _SMOOTH_FRACTION), _SMOOTH_MOST_STEPS)


def smooth(values: Sequence[float], low: float = -math.inf, high: float = math.inf) -> np.ndarray:
    """Gaussian average of the finite values from ``low`` to ``high``.

    Values outside of these are left out: one extreme step would bend the line far around it. The line is
    continued over them, but has a gap where a value is not finite.
    """
    raw = np.asarray(values, dtype=float)
    sigma = smoothing_sigma(len(raw))
    if sigma == 0.0:
        return raw
    half = min(math.ceil(3 * sigma), (len(raw) - 1) // 2)
    kernel = np.exp(-0.5 * (np.arange(-half, half + 1) / sigma) ** 2)
    used = np.isfinite(raw) & (raw >= low) & (raw <= high)
    weights = np.convolve(used.astype(float), kernel, mode="same")
    sums = np.convolve(np.where(used, raw, 0.0), kernel, mode="same")
    has_value = np.isfinite(raw) & (weights > 0.0)
    return np.where(has_value, sums / np.where(has_value, weights, 1.0), np.nan)


@dataclass(frozen=True)
class _Line:
    """A curve of one run, ready to draw."""

    color: str
    style: Any
    curve: Curve
    train: Series | None
    validation: Series | None


def _scaled(series: Series | None, scale: float) -> Series | None:
    return Series(series.steps, [value * scale for value in series.values]) if series is not None else None


def _run_look(index: int) -> tuple[str, Any]:
    """Colour and dashes of a run among several; more runs than colours go on with other dashes."""
    turn, color = divmod(index, len(RUN_COLORS))
    return RUN_COLORS[color], _LINE_STYLES[turn % len(_LINE_STYLES)]


def _lines(panel: Panel, runs: Sequence[Run]) -> list[_Line]:
    lines = []
    for curve_index, curve in enumerate(panel.curves):
        for run_index, run in enumerate(runs):
            train = _scaled(run.metrics.get(curve.metric), curve.scale)
            validation = _scaled(run.metrics.get(VALIDATION + curve.metric), curve.scale)
            if train is None and validation is None:
                continue
            if len(runs) == 1:
                color, style = ROLES[curve.role], _LINE_STYLES[0]
            else:
                color, style = _run_look(run_index)
                # Runs differ by colour, curves of a panel by dashes.
                style = _LINE_STYLES[curve_index % len(_LINE_STYLES)] if curve_index else style
            lines.append(_Line(color, style, curve, train, validation))
    return lines


def _finite_or_gap(values: Sequence[float]) -> np.ndarray:
    raw = np.asarray(values, dtype=float)
    return np.where(np.isfinite(raw), raw, np.nan)


def _draw_line(axes: Any, line: _Line, low: float, high: float) -> None:
    if line.train is not None:
        steps, values = line.train.steps, _finite_or_gap(line.train.values)
        if line.curve.smooth and smoothing_sigma(len(steps)) > 0.0:
            axes.plot(steps, values, color=line.color, alpha=0.25, linewidth=0.8, zorder=2)
            values = smooth(line.train.values, low, high)
        marker = "." if len(steps) == 1 else None
        axes.plot(steps, values, color=line.color, linestyle=line.style, linewidth=1.7, marker=marker, zorder=3)
    if line.validation is not None:
        series = line.validation.finite()
        # A run with many validations would otherwise be a string of beads.
        size = 5.5 if len(series.steps) <= 30 else 3.5
        axes.plot(
            series.steps,
            series.values,
            linestyle="none",
            marker="o",
            markersize=size,
            color=line.color,
            markeredgecolor=axes.get_facecolor(),
            markeredgewidth=0.9,
            zorder=4,
        )


def _draw_band(axes: Any, panel: Panel, run: Run) -> tuple[Line2D, float, float] | None:
    """Draw the panel's band; returns its legend entry and its range, but for its few most extreme steps."""
    if panel.band is None:
        return None
    center, width = run.metrics.get(panel.band[0]), run.metrics.get(panel.band[1])
    if center is None or width is None or center.steps != width.steps:
        return None
    middle, half = _finite_or_gap(center.values), _finite_or_gap(width.values)
    if not np.isfinite(middle - half).any():
        return None
    color = ROLES["neutral"]
    axes.fill_between(center.steps, middle - half, middle + half, color=color, alpha=0.16, linewidth=0, zorder=1)
    entry = Line2D([], [], color=color, alpha=0.3, linewidth=7, label=panel.band[2])
    return entry, float(np.nanpercentile(middle - half, 2)), float(np.nanpercentile(middle + half, 98))


def _limits(panel: Panel, lines: Sequence[_Line]) -> tuple[float, float, list[float]]:
    """Axis limits that a few extreme steps cannot spoil, and the training values that lie outside of them."""
    train = [value for line in lines if line.train is not None for value in line.train.finite().values]
    validation = [value for line in lines if line.validation is not None for value in line.validation.finite().values]
    low, high = np.percentile(train or validation, [1, 99])
    low, high = min([low, *validation]), max([high, *validation])
    spread = high - low or abs(high) or 1.0
    # A steep start of a long run is not an outlier; what lies further off than this would flatten all the rest.
    spread *= _EXTREME_SPREADS
    low = min([low, *(value for value in train if value >= low - spread)])
    high = max([high, *(value for value in train if value <= high + spread)])
    outside = [value for value in train if value < low or value > high]
    pad = 0.08 * (high - low or spread / _EXTREME_SPREADS)
    bottom, top = low - pad, high + pad
    if panel.floor is not None:
        bottom = max(bottom, panel.floor - 0.02 * (top - panel.floor)) if low >= panel.floor else bottom
    if panel.ceiling is not None and high <= panel.ceiling:
        top = min(top, panel.ceiling + 0.02 * (panel.ceiling - bottom))
    return float(bottom), float(top), outside


def _frame(axes: Any, panel: Panel) -> None:
    axes.set_facecolor(BACKGROUND)
    axes.set_ylabel(panel.ylabel, color=TEXT, fontsize=9.5)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.get_offset_text().set_color(MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 2.5, 5, 10]))


def _legend_style(labels: Sequence[str]) -> dict[str, Any]:
    """Common looks, with as many columns as have room."""
    widths = [len(label) * _LETTER_INCHES + _HANDLE_INCHES for label in labels]
    in_one_row = sum(widths) <= _LEGEND_INCHES
    return {
        "ncols": len(labels) if in_one_row else max(1, int(_LEGEND_INCHES / max(widths))),
        "frameon": False,
        "fontsize": 9,
        "handlelength": 1.6,
        "columnspacing": 1.3,
        "labelcolor": TEXT,
    }


def _panel_legend(axes: Any, lines: Sequence[_Line], extra: Sequence[Line2D], *, several: bool) -> None:
    """What the lines of a panel are; of several runs only the dashes, as the figure's legend has the colours."""
    entries: list[Line2D] = []
    if not several:
        entries = [Line2D([], [], color=line.color, linewidth=2.2, label=line.curve.label) for line in lines]
    elif len({line.curve.label for line in lines}) > 1:
        styles = {line.curve.label: line.style for line in lines}
        entries = [Line2D([], [], color=MUTED, linestyle=s, linewidth=1.8, label=n) for n, s in styles.items()]
    entries += extra
    if not several and any(line.validation is not None for line in lines):
        entries.append(_validation_entry())
    if not entries or (len(entries) == 1 and not several):
        return  # the axis label already says it
    style = _legend_style([str(entry.get_label()) for entry in entries])
    axes.legend(handles=entries, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2, **style)


def _validation_entry() -> Line2D:
    return Line2D([], [], marker="o", linestyle="none", markersize=5.5, color=MUTED, label="validation")


def _figure_legend(figure: Figure, panels: Sequence[Panel], runs: Sequence[Run]) -> None:
    """Which run has which colour."""
    entries = []
    for index, run in enumerate(runs):
        color, style = _run_look(index)
        label = run.label if len(run.label) <= _LABEL_LETTERS else run.label[: _LABEL_LETTERS - 1] + "…"
        label = plot_text(label)
        entries.append(Line2D([], [], color=color, linestyle=style, linewidth=2.2, label=label))
    if any(line.validation is not None for panel in panels for line in _lines(panel, runs)):
        entries.append(_validation_entry())
    style = _legend_style([str(entry.get_label()) for entry in entries])
    figure.legend(handles=entries, loc="outside upper left", **style)


def _note_outside(axes: Any, outside: Sequence[float]) -> None:
    extremes = sorted({min(outside), max(outside)})
    noun = "step" if len(outside) == 1 else "steps"
    note = f"{len(outside)} {noun} not shown ({' to '.join(f'{value:.3g}' for value in extremes)})"
    # Inside the frame: above it stands the legend.
    place = {"transform": axes.transAxes, "ha": "right", "va": "bottom", "fontsize": 8, "zorder": 5}
    axes.text(0.995, 0.02, note, color=MUTED, bbox={"facecolor": BACKGROUND, "edgecolor": "none", "pad": 1.0}, **place)


def _draw_panel(axes: Any, panel: Panel, runs: Sequence[Run]) -> None:
    lines = _lines(panel, runs)
    bottom, top, outside = _limits(panel, lines)
    _frame(axes, panel)
    for line in lines:
        _draw_line(axes, line, bottom, top)
    extra = []
    band = _draw_band(axes, panel, runs[0]) if len(runs) == 1 else None
    if band is not None:
        entry, low, high = band
        extra.append(entry)
        pad = 0.04 * (high - low)
        bottom, top = min(bottom, low - pad), max(top, high + pad)
    if panel.reference is not None:
        level, name = panel.reference
        bottom, top = min(bottom, level - 0.03 * (top - level)), max(top, level + 0.03 * (level - bottom))
        extra.append(_draw_level(axes, level, name))
    axes.set_ylim(bottom, top)
    if outside:
        _note_outside(axes, outside)
    _panel_legend(axes, lines, extra, several=len(runs) > 1)


def _draw_level(axes: Any, level: float, name: str) -> Line2D:
    """A dashed line to compare with; its legend entry."""
    dashes: dict[str, Any] = {"color": MUTED, "linewidth": 1.0, "linestyle": (0, (3, 3))}
    axes.axhline(level, zorder=1, **dashes)
    return Line2D([], [], label=name, **dashes)


def one_panel(
    ylabel: str,
    lines: Callable[[Any], None],
    level: tuple[float, str] | None = None,
    *,
    xlabel: str = "optimizer step",
    from_zero: bool = True,
) -> bytes:
    """A picture of one pair of axes, by default over the steps from 0 up, in the looks of the others.

    Args:
        ylabel: of the axis.
        lines: draws on the axes; what it labels is in the legend.
        level: to compare with, and what it is.
        xlabel: of the other axis.
        from_zero: begin the axis at 0.
    """
    with matplotlib.rc_context({"font.family": "sans-serif", "axes.formatter.useoffset": False}):
        height = _PANEL_INCHES[1] + _FRAME_INCHES
        figure = Figure(figsize=(_WIDTH_INCHES, height), dpi=_DPI, facecolor=BACKGROUND, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots()
        _frame(axes, Panel(ylabel, ()))
        lines(axes)
        entries = list(axes.get_legend_handles_labels()[0])
        if level is not None:
            entries.append(_draw_level(axes, *level))
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(xlabel, color=TEXT, fontsize=9.5)
        if entries:
            style = _legend_style([str(entry.get_label()) for entry in entries])
            axes.legend(handles=entries, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2, **style)
        return picture_bytes(canvas)


def picture_bytes(canvas: FigureCanvasAgg) -> bytes:
    """A figure as a small PNG."""
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[:, :, :3]
    image = Image.fromarray(np.ascontiguousarray(pixels))
    buffer = io.BytesIO()
    image.quantize(_PALETTE, dither=Image.Dither.NONE).save(buffer, format="png")
    return buffer.getvalue()


def draw(chart: Chart, runs: Sequence[Run]) -> bytes | None:
    """A chart as PNG; None if no run has any of its metrics.

    Args:
        chart: what to draw; panels without a metric are left out.
        runs: one run, drawn in the colours of the series, or several, one colour each.
    """
    panels = [panel for panel in chart.panels if _lines(panel, runs)]
    if not panels:
        return None
    height = _PANEL_INCHES.get(len(panels), _LOW_PANEL_INCHES) * len(panels) + _FRAME_INCHES
    with matplotlib.rc_context({"font.family": "sans-serif", "axes.formatter.useoffset": False}):
        figure = Figure(figsize=(_WIDTH_INCHES, height), dpi=_DPI, facecolor=BACKGROUND, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
        for axes, panel in zip(grid[:, 0], panels, strict=True):
            _draw_panel(axes, panel, runs)
        last_step = max(run.metrics.last_step for run in runs)
        grid[-1, 0].set_xlim(0, last_step * 1.015 + 0.5)
        grid[-1, 0].set_xlabel("optimizer step", color=TEXT, fontsize=9.5)
        figure.align_ylabels(grid[:, 0])
        if len(runs) > 1:
            _figure_legend(figure, panels, runs)
        return picture_bytes(canvas)


def draw_all(runs: Sequence[Run], charts: Sequence[Chart] = CHARTS) -> list[Picture]:
    """All charts for which the runs have metrics."""
    drawn = ((chart, draw(chart, runs)) for chart in charts)
    return [Picture(chart, png) for chart, png in drawn if png is not None]
