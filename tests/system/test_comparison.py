"""Whole comparisons, small: runs are forked from a server."""

import dataclasses
import json
import re
import sys

import pytest

from nemo_lmpo.paper.comparison.command import main
from nemo_lmpo.paper.comparison.scales import SCALES, TINY

SMALL = [
    "model.global_batch_size=16",
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.architecture.num_hidden_layers=2",
    "data.train.limit=64",
    "data.validation.limit=8",
    "trainer.max_steps=3",
]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="runs are forked")
def test_small_comparison_end_to_end(tmp_path, monkeypatch, capsys):
    small = dataclasses.replace(TINY, start=(*TINY.start, *SMALL), answers=4, answer_tokens=8)
    monkeypatch.setitem(SCALES, "tiny", small)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = str(tmp_path / "out")
    arguments = ["--suite", "figure2", "--seeds", "2", "--output", out, "--quiet", "--jobs", "2"]
    assert main([*arguments, *SMALL]) == 0
    page = (tmp_path / "out" / "comparison.html").read_text()
    markdown = (tmp_path / "out" / "comparison.md").read_text()
    assert "Without a result" not in page
    assert page.count("data:image/png") == 3
    for name in re.findall(r"\((figures/\w+\.png)\)", markdown):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    assert re.search(r"\| LMPO \| -\d\.\d+ ± \d", markdown)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("measured.json")}
    assert len(before) == 1 + 1 + 2 * 2  # the start model's training, the start model measured, LMPO, SimPO
    assert main([*arguments, *SMALL]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("measured.json")} == before


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="runs are forked")
def test_failed_run_is_named_and_the_page_is_written(tmp_path, monkeypatch, capsys):
    small = dataclasses.replace(TINY, start=(), answers=0)
    monkeypatch.setitem(SCALES, "tiny", small)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # The first rows are looked at before anything starts; these are good.
    good = {"prompt": "sort b a", "chosen": "a b", "rejected": "b a"}
    rows = [json.dumps(good)] * 16 + [json.dumps({**good, "chosen": ""})]
    (tmp_path / "broken.jsonl").write_text("\n".join(rows) + "\n")
    broken = f"data.train.path={tmp_path / 'broken.jsonl'}"
    assert main(["--suite", "figure2", "--output", str(tmp_path / "out"), "--quiet", "--seeds", "1", broken]) == 1
    assert "3 runs failed" in capsys.readouterr().err
    assert "Without a result: start model (seed 42)" in (tmp_path / "out" / "comparison.md").read_text()
    log = next((tmp_path / "out").rglob("train.log")).read_text()
    assert "broken.jsonl line 17" in log
