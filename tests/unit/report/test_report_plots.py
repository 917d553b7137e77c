from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nemo_lmpo.report.charts import CHARTS, LOGPS, Curve, Panel
from nemo_lmpo.report.plots import ROLES, RUN_COLORS, _limits, _Line, draw, draw_all, smooth, smoothing_sigma
from nemo_lmpo.report.read import Metrics, Run, Series, read_run


def run_of(**series: Any) -> Run:
    named = {
        name.replace("__", "/"): Series(list(range(1, len(values) + 1)), values) for name, values in series.items()
    }
    return Run("r", Metrics(named, max(len(values) for values in series.values())))


def picture(png: bytes) -> Any:
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def has_color(pixels: Any, color: str, tolerance: int = 12) -> bool:
    wanted = np.array([int(color[start : start + 2], 16) for start in (1, 3, 5)])
    return bool((np.abs(pixels - wanted).max(axis=2) <= tolerance).any())


def test_charts_of_a_whole_run_are_pictures_in_their_colours(make_run: Callable[..., Path]) -> None:
    pictures = draw_all([read_run(make_run())])
    assert [drawn.chart.name for drawn in pictures] == [chart.name for chart in CHARTS]
    for drawn in pictures:
        pixels = picture(drawn.png)
        assert pixels.shape[1] == 1008  # 5.6 inches of 180 points
        for panel in drawn.chart.panels:
            if panel.curves[0].metric != "mfu":
                assert has_color(pixels, ROLES[panel.curves[0].role]), drawn.chart.name


def test_charts_and_panels_without_metrics_are_left_out() -> None:
    run = run_of(loss=[3.0, 2.0], grad_norm=[1.0, 1.0])
    assert [drawn.chart.name for drawn in draw_all([run])] == ["loss", "optimization"]
    both = run_of(grad_norm=[1.0, 1.0], lr=[0.1, 0.2])
    chart = next(chart for chart in CHARTS if chart.name == "optimization")
    # One panel of 2.35 inches, or two of 1.95, and 0.75 around them, at 180 points an inch.
    assert picture(draw(chart, [run])).shape[0] == round(3.1 * 180)
    assert picture(draw(chart, [both])).shape[0] == round(4.65 * 180)


def test_several_runs_have_one_colour_each(make_run: Callable[..., Path]) -> None:
    first, second = read_run(make_run(name="a"), label="LMPO"), read_run(make_run(name="b"), label="SimPO")
    pixels = picture(draw(LOGPS, [first, second]))
    assert has_color(pixels, RUN_COLORS[0])
    assert has_color(pixels, RUN_COLORS[1])
    assert not has_color(pixels, ROLES["rejected"])


def test_more_runs_than_colours_and_long_names_can_be_drawn(make_run: Callable[..., Path]) -> None:
    run_dir = make_run()
    runs = [read_run(run_dir, label=f"a recipe with a very long name, number {index} of ten") for index in range(10)]
    # Legend and panels share the height of a picture: one chart of every number of panels.
    for chart in {len(chart.panels): chart for chart in CHARTS}.values():
        assert picture(draw(chart, runs)).shape[1] == 1008


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "values",
    [[1.0], [math.nan, 1.0, math.inf], [2.0] * 50, [0.0] * 3, [1e30, -1e30], [1.0] * 40 + [math.nan] * 10, [1e-12] * 4],
    ids=["one step", "not finite", "constant", "zero", "huge", "ends not finite", "tiny"],
)
def test_odd_values_can_be_drawn(values: list[float]) -> None:
    run = run_of(loss=values, val__loss=values[:1], lmpo__margin=values, lmpo__mean=values, lmpo__std=values)
    for drawn in draw_all([run]):
        picture(drawn.png)


def test_smoothing_starts_with_enough_steps() -> None:
    assert smoothing_sigma(24) == 0.0
    assert smoothing_sigma(25) == 1.0
    assert smoothing_sigma(500) == 10.0  # a fiftieth
    assert smoothing_sigma(10**6) == 200.0
    np.testing.assert_array_equal(smooth([1.0, 5.0, 2.0]), [1.0, 5.0, 2.0])


def test_smoothing_keeps_constants_and_does_not_lag() -> None:
    np.testing.assert_allclose(smooth([3.0] * 100), 3.0)
    # A symmetric average of a straight line is the line, away from the ends.
    line = np.arange(200.0)
    np.testing.assert_allclose(smooth(line.tolist())[20:-20], line[20:-20])


def test_smoothing_by_hand() -> None:
    # 30 steps: standard deviation 1, half-width 3. A single 1 in zeros gives the kernel e^(-k^2/2) / sum.
    values = [0.0] * 30
    values[15] = 1.0
    total = 1 + 2 * (math.exp(-0.5) + math.exp(-2) + math.exp(-4.5))
    smoothed = smooth(values)
    assert smoothed[15] == pytest.approx(1 / total)
    assert smoothed[17] == pytest.approx(math.exp(-2) / total)
    assert smoothed[19] == 0.0


def test_smoothing_leaves_out_what_is_not_finite_or_outside() -> None:
    values = [1.0] * 60
    values[10], values[20], values[30] = math.nan, math.inf, 64.8
    smoothed = smooth(values, low=0.0, high=2.0)
    assert np.isnan(smoothed[[10, 20]]).all()
    assert smoothed[30] == pytest.approx(1.0)
    np.testing.assert_allclose(np.delete(smoothed, [10, 20]), 1.0)


def limits(values: list[float], panel: Panel | None = None, validation: list[float] | None = None) -> tuple[Any, ...]:
    curve = Curve("loss", "loss", "loss")
    train = Series(list(range(len(values))), values)
    series = Series([1] * len(validation), validation) if validation else None
    return _limits(panel or Panel("loss", (curve,)), [_Line("#000000", "-", curve, train, series)])


def test_one_extreme_step_does_not_spoil_the_axis() -> None:
    values = [64.8] + [2.0 - 0.01 * step for step in range(150)]
    bottom, top, outside = limits(values)
    assert outside == [64.8]
    assert bottom < 0.51
    assert 2.0 < top < 2.3


def test_what_is_a_little_outside_is_shown() -> None:
    values = [2.5] + [2.0 - 0.01 * step for step in range(150)]
    _, top, outside = limits(values)
    assert outside == []
    assert top > 2.5


def test_validation_is_always_shown() -> None:
    _, top, _ = limits([1.0, 1.1] * 50, validation=[9.0])
    assert top > 9.0


def test_floor_and_ceiling() -> None:
    panel = Panel("%", (), floor=0.0, ceiling=100.0)
    bottom, top, _ = limits([0.0, 50.0, 100.0], panel)
    assert -5.0 < bottom <= 0.0
    assert 100.0 <= top < 105.0
