"""All plans of the documentation are what the command prints: some 50 searches, the largest over 1,024 GPUs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path


def test_the_pages_hold_every_table() -> None:
    root = Path(__file__).resolve().parent.parent.parent
    plans = runpy.run_path(str(root / "benchmarks" / "plan_tables.py"))
    held: dict[str, set[str]] = {}
    for page, name, content in plans["tables"]():
        text = (root / "docs" / page).read_text()
        assert plans["place"](text, name, content) == text, f"{name}: run python benchmarks/plan_tables.py --write"
        held.setdefault(page, set()).add(name)
    for path in (root / "docs").glob("*.md"):
        promised = re.findall(r"<!-- (.*?): python benchmarks/plan_tables.py", path.read_text())
        assert sorted(promised) == sorted(held.get(path.name, set())), path.name
