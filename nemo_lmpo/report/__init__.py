"""The report of a run: curves as PNG files and one HTML page that holds them.

Reads what a run directory holds (`metrics.jsonl`, `config.yaml`, `run.json`) and needs neither torch nor the
run's hardware.
"""

from __future__ import annotations

from pathlib import Path


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
    # Imported here, so that a wrong command line is answered before matplotlib is loaded.
    from nemo_lmpo.report.page import write_run_report

    return write_run_report(Path(run_dir), Path(output) if output is not None else None)
