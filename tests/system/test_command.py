"""The command as users type it: another directory, a fresh Python, twice the same line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.system.processes import SMALL


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(directory / "cache")}
    command = [sys.executable, "-m", "nemo_lmpo.train", "--config-name", "lmpo_tiny", *SMALL, *arguments]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120)


def test_trains_resumes_and_ends(tmp_path: Path) -> None:
    options = ("logging.report=true", "logging.tensorboard=true")
    first = run(tmp_path, *options, "trainer.max_steps=2")
    assert first.returncode == 0, first.stderr
    assert "done: 2 steps; checkpoints in runs/lmpo_tiny/checkpoints" in first.stderr
    assert "Traceback" not in first.stderr
    directory = tmp_path / "runs" / "lmpo_tiny"
    present = {path.name for path in directory.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "tensorboard", "report.html"} <= present
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "cache"}, "written elsewhere"
    again = run(tmp_path, *options, "trainer.max_steps=3")
    assert again.returncode == 0, again.stderr
    assert "resumed after step 2" in again.stderr
    assert "done: 3 steps" in again.stderr
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "val/loss" in line] == [2, 3]
