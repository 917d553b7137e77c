"""All plans of docs/performance.md are what the command prints: some 20 searches, the largest over 1,024 GPUs."""

from __future__ import annotations

import runpy
from pathlib import Path


def test_the_page_holds_every_table() -> None:
    root = Path(__file__).resolve().parent.parent.parent
    plans = runpy.run_path(str(root / "benchmarks" / "plan_tables.py"))
    page = (root / "docs" / "performance.md").read_text()
    for name, content in plans["tables"]():
        assert plans["place"](page, name, content) == page, f"{name}: run python benchmarks/plan_tables.py --write"
