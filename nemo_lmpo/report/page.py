"""Write the report of a run: `report.html` with the pictures inside, and the pictures as files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from nemo_lmpo.report.document import html_templates
from nemo_lmpo.report.read import Run, read_run
from nemo_lmpo.report.summary import best_step, metric_rows, saving_text, settings_rows, state_text
from nemo_lmpo.runtime.files import replace_file

REPORT_FILE = "report.html"
PICTURES_DIR = "report"


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


def _date(moment: float | None) -> str:
    """A time as people write it; empty where the metrics name none, or none that a calendar has."""
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment)) if moment else ""
    except (ValueError, OverflowError, OSError):
        return ""


def _words_and_tables(run: Run) -> dict[str, Any]:
    """What the template is told besides pictures and answers."""
    state, kind = state_text(run)
    header, rows = metric_rows(run)
    best = best_step(run)
    return {
        "title": f"{run.label}: report",
        "label": run.label,
        "state": state,
        "state_kind": kind,
        "newest": _date(run.metrics.last_time),
        "saving": saving_text(run),
        "results_header": header,
        "results": rows,
        "best": best[1] if best else "",
        "settings": settings_rows(run),
        "how_to_read": _how_to_read(run),
    }


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
    from nemo_lmpo.report.plots import draw_all
    from nemo_lmpo.report.samples import draw_samples, read_samples

    drawn, samples = draw_all([run]), read_samples(run_dir)
    of_samples = None if samples is None else draw_samples(samples, run)
    config = run_dir / "config.yaml"
    config_text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    pictures = run_dir / PICTURES_DIR
    pictures.mkdir(exist_ok=True)
    for picture in drawn if of_samples is None else [*drawn, of_samples]:
        replace_file(pictures / f"{picture.chart.name}.png", picture.png)
    page = Path(output) if output is not None else run_dir / REPORT_FILE
    page.parent.mkdir(parents=True, exist_ok=True)
    shown = {"config_text": config_text, "pictures": drawn, "samples": samples, "samples_picture": of_samples}
    template = html_templates("nemo_lmpo.report").get_template("run.html.j2")
    replace_file(page, template.render(**_words_and_tables(run), **shown))
    return page
