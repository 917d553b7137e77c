"""Write the report of a run: `report.html` with the pictures inside, and the pictures as files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_lmpo.report import html
from nemo_lmpo.report.read import Run, read_run
from nemo_lmpo.report.summary import best_step, metric_rows, settings_rows, state_text
from nemo_lmpo.runtime.atomic import replace_file

if TYPE_CHECKING:
    from nemo_lmpo.report.plots import Picture

REPORT_FILE = "report.html"
PICTURES_DIR = "report"


def _header(run: Run) -> str:
    state, kind = state_text(run)
    newest = ""
    if run.metrics.last_time:
        moment = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.metrics.last_time))
        newest = f'<span class="note">newest metrics {moment}</span>'
    return f'<h1>{html.escape(run.label)}</h1><div><span class="state {kind}">{html.escape(state)}</span>{newest}</div>'


def _results(run: Run) -> str:
    header, rows = metric_rows(run)
    if not rows:
        return ""
    best = best_step(run)
    note = f"<p>Best is the step with the {html.escape(best[1])}.</p>" if best else ""
    return f'<section class="card"><h2>Results</h2>{note}{html.table(rows, header=header, kind="numbers")}</section>'


def _settings(run: Run, config_text: str) -> str:
    rows = settings_rows(run)
    if not rows:
        return ""
    whole = f"<details><summary>Whole configuration</summary><pre>{html.escape(config_text)}</pre></details>"
    return f'<section class="card"><h2>Settings</h2>{html.table(rows, kind="settings")}{whole}</section>'


def _how_to_read(run: Run) -> str:
    from nemo_lmpo.report.plots import smoothing_sigma

    sigma = smoothing_sigma(run.metrics.last_step)
    if sigma == 0.0:
        return "Lines: training, every step. Dots: validation."
    # Two standard deviations to each side hold 95 % of the weight.
    return (
        f"Faint lines: training, every step. Strong lines: its average over about {round(4 * sigma)} steps around. "
        "Dots: validation."
    )


def build_page(run: Run, light: Sequence[Picture], dark: Sequence[Picture], config_text: str = "") -> str:
    """The page of one run.

    Args:
        run: for title and tables.
        light: the pictures on white.
        dark: the same pictures on black, in the same order.
        config_text: the whole configuration, to be shown on demand.
    """
    figures = "\n".join(
        html.figure(bright.chart.title, bright.chart.caption, bright.png, dim.png)
        for bright, dim in zip(light, dark, strict=True)
    )
    body = (
        f'{_header(run)}\n<div class="top">{_results(run)}{_settings(run, config_text)}</div>\n'
        f'<h2>Curves</h2><p>{_how_to_read(run)}</p>\n<div class="curves">{figures}</div>'
    )
    return html.document(f"{run.label}: report", body)


def write_report(run_dir: Path | str, output: Path | str | None = None) -> Path:
    """Draw the curves of a run and write its page.

    Args:
        run_dir: the run's directory; the PNG files go to `report/` in it.
        output: the page; `report.html` in the run directory by default.

    Returns:
        Where the page is.

    Raises:
        UserError: no run directory, or no metrics in it.
        OSError: the files cannot be written.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    # Imported here, so that a wrong directory is answered before matplotlib is loaded.
    from nemo_lmpo.report.plots import DARK, LIGHT, draw_all

    light, dark = draw_all([run], LIGHT), draw_all([run], DARK)
    config = run_dir / "config.yaml"
    config_text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    pictures = run_dir / PICTURES_DIR
    pictures.mkdir(exist_ok=True)
    for picture in light:
        replace_file(pictures / f"{picture.chart.name}.png", picture.png)
    page = Path(output) if output is not None else run_dir / REPORT_FILE
    page.parent.mkdir(parents=True, exist_ok=True)
    replace_file(page, build_page(run, light, dark, config_text).encode("utf-8"))
    return page
