"""Whole comparisons, small: runs are forked from a server."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_lmpo.cli import ModuleMain
from nemo_lmpo.compare import main
from nemo_lmpo.paper.comparison.scales import SCALES, TINY
from tests.system.processes import training

ROOT = Path(__file__).resolve().parent.parent.parent
export_main = ModuleMain("export")

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
def test_small_comparison_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
def test_failed_run_is_named_and_the_page_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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


def of_session(session: int) -> list[str]:
    """Command lines of the session's processes that still run."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append((place / "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="runs are forked")
def test_nothing_of_a_killed_comparison_works_on(tmp_path: Path) -> None:
    """Its run saves, as where the comparison is asked to end (tests/unit/paper/test_execute.py)."""
    command = [sys.executable, "-m", "nemo_lmpo.compare", "--suite", "figure2", "--output", "out", "--quiet"]
    started = time.monotonic()
    with subprocess.Popen(
        [*command, "trainer.max_steps=100000"],
        cwd=tmp_path,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            run = tmp_path / "out" / "runs"
            while not any(path.stat().st_size for path in run.rglob("metrics.jsonl")):
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() - started < 200
                time.sleep(0.1)
            assert any("forkserver" in line for line in of_session(process.pid))
            process.kill()
            while left := of_session(process.pid):
                assert time.monotonic() - started < 300, left
                time.sleep(0.1)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    log = next(run.rglob("train.log")).read_text()
    assert "stopped by SIGTERM after step" in log
    assert list(run.rglob("step_*/manifest.json"))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="runs are forked")
def test_the_listed_commands_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In their order: the start model is trained, written, and started from."""
    small = dataclasses.replace(TINY, start=(*TINY.start, *SMALL))
    monkeypatch.setitem(SCALES, "tiny", small)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["--suite", "figure2", "--seeds", "1", "--output", "out dir", "--list", *SMALL]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 + 3
    for line in lines[:3]:
        assert line[:2] == ["python", "-m"]
        if line[2] == "nemo_lmpo.export":
            assert export_main(line[3:]) == 0
            continue
        with training(line[3:], tmp_path, command=line[2]) as process:
            process.join(200)
        assert process.exitcode == 0, (tmp_path / "output").read_text()
