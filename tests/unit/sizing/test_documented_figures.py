"""Figures of the documentation that a command prints are what it prints."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import nemo_lmpo
from nemo_lmpo.train import main

DOCS = Path(nemo_lmpo.__file__).parent.parent / "docs"
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="an installed package has no docs folder")
PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "total")


def table(page: str, header: str) -> list[list[str]]:
    """The rows of the table whose header line begins so."""
    lines = (DOCS / page).read_text().split(header, 1)[1].splitlines()[2:]
    rows = lines[: next(place for place, line in enumerate(lines) if not line.startswith("|"))]
    assert rows
    return [[cell.strip(" *") for cell in row.strip("|").split(" | ")] for row in rows]


def dry_run(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    assert main(["--config-name", "lmpo_llama3_8b", *overrides, "dry_run=true"]) == 0
    return capsys.readouterr().out


def memory(text: str) -> dict[str, str]:
    """GiB of a rank as the dry run prints them, to a decimal."""
    found = dict(re.findall(r"^  (\w+) +(\d+\.\d\d)$", text, re.MULTILINE))
    return {part: f"{float(found[part]):.1f}" for part in PARTS}


def test_the_dry_runs_of_the_slurm_page(capsys: pytest.CaptureFixture[str]) -> None:
    for gpus, overrides, layout, *figures in table("slurm.md", "| GPUs | overrides | layout |"):
        nodes, devices = gpus.split(" x ")
        given = [] if overrides == "none" else overrides.strip("`").split()
        text = dry_run(capsys, f"trainer.num_nodes={nodes}", f"trainer.devices={devices}", *given)
        assert dict(zip(PARTS, figures, strict=True)) == memory(text), overrides
        printed = re.search(r"^layout +(.*)$", text, re.MULTILINE)
        assert printed is not None
        for size in layout.partition(",")[0].split(" x "):
            assert size in printed[1].partition(",")[0].split(" x "), (layout, printed[1])


def test_the_pinned_memory_of_the_slurm_page(capsys: pytest.CaptureFixture[str]) -> None:
    documented = re.search(
        r"keeps: ([\d.]+) GiB for.*?through ([\d.]+) GiB", (DOCS / "slurm.md").read_text(), re.DOTALL
    )
    printed = re.search(r"save from GPUs: ([\d.]+) GiB in the background, ([\d.]+) GiB while", dry_run(capsys))
    assert documented is not None
    assert printed is not None
    assert documented.groups() == printed.groups()


def test_the_a40_line_of_the_slurm_page(capsys: pytest.CaptureFixture[str]) -> None:
    found = re.search(r"\*\*A40.*?`([^`]+)` takes ([\d.]+) GiB", (DOCS / "slurm.md").read_text(), re.DOTALL)
    assert found is not None
    assert memory(dry_run(capsys, *found[1].split()))["total"] == found[2]


def test_the_figures_of_the_lora_page(capsys: pytest.CaptureFixture[str]) -> None:
    found = re.search(
        r"takes ([\d.]+) GiB of one GPU.*?`lmpo_llama3_8b ([^`]+)`\), ([\d.]+) GiB with full\s+recomputation; "
        r"full training takes ([\d.]+) GiB",
        (DOCS / "lora.md").read_text(),
        re.DOTALL,
    )
    assert found is not None
    plain, overrides, recomputed, full = found.groups()
    given = overrides.split()
    assert memory(dry_run(capsys, *given))["total"] == plain
    assert memory(dry_run(capsys, *given, "model.activations_checkpoint_granularity=full"))["total"] == recomputed
    without = [override for override in given if not override.startswith("model.peft")]
    assert memory(dry_run(capsys, *without))["total"] == full


BENCHMARK = DOCS.parent / "benchmarks" / "plan_tables.py"


@pytest.mark.skipif(not BENCHMARK.is_file(), reason="an installed package has no benchmarks folder")
def test_the_plans_of_the_performance_page() -> None:
    """What is quick of it; the rest is held by tests/fuzz/test_plan_tables.py."""
    plans = runpy.run_path(str(BENCHMARK))
    page = (DOCS / "performance.md").read_text()
    made = {"layouts of 8 B": plans["layouts_of_8b"](), "forward passes": plans["forward_passes"]()}
    made["networks 8b"] = plans["networks"](plans["SETUPS"]["8b"])
    made["flags 8b"] = plans["flags"](plans["SETUPS"]["8b"])
    settings = (DOCS / "flags.md").read_text()
    assert plans["place"](settings, "one GPU", plans["one_gpu"]()) == settings
    for name, content in made.items():
        assert plans["place"](page, name, content) == page, f"run python {BENCHMARK.name} --write"
    other = made["forward passes"].replace("=paper` | 0", "=paper` | 9")
    assert plans["place"](page, "forward passes", other) != page
