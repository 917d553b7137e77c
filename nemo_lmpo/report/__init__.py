"""The report of a run: curves as PNG files and one HTML page that holds them.

Reads what a run directory holds (`metrics.jsonl`, `config.yaml`, `run.json`) and needs neither torch nor the
run's hardware.
"""

from __future__ import annotations

from nemo_lmpo.report.page import write_report

__all__ = ["write_report"]
