"""`generate` as a process that is killed and stopped again and again: the last run ends with the expected bits."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.generate.__main__ import main
from nemo_lmpo.generate.kept import SUFFIX
from nemo_lmpo.runtime.launch import LaunchInfo
from nemo_lmpo.training.session import open_session
from tests.system.processes import SMALL, training

COMMAND = "nemo_lmpo.generate.__main__"
PROMPTS = 40


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A command that takes a while: a model of random weights that seldom ends its answers itself."""
    overrides = [*SMALL, "data.train.limit=64", "data.validation.path=null", f"run_dir={tmp_path / 'run'}"]
    config = load_recipe("lmpo_tiny", [*overrides, f"data.cache_dir={tmp_path / 'cache'}"])
    with open_session(config, LaunchInfo()) as session:
        session.files.save_to(tmp_path / "model")
    lines = [json.dumps({"prompt": f"sort {' '.join('abcdefgh'[: 2 + index % 5])}"}) for index in range(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    given = ["--checkpoint", str(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.jsonl")]
    return [*given, "--batch-size", "1", "--temperature", "1", "--max-new-tokens", "100"]


@pytest.mark.timeout(300)
def test_kills_and_signals_cost_no_answer(arguments: list[str], tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    journal = output.with_name(output.name + SUFFIX)

    def lines() -> int:
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    before = 0
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        log = f"log.{before}"
        with training([*arguments, "--output", str(output)], tmp_path, command=COMMAND, output=log) as process:
            deadline = time.monotonic() + 120
            while lines() < before + 3 and process.is_alive() and time.monotonic() < deadline:
                time.sleep(0.002)
            assert process.is_alive(), (tmp_path / log).read_text()
            os.kill(process.pid, number)
            process.join(timeout=60)
            assert process.exitcode == (-signal.SIGKILL if number == signal.SIGKILL else 128 + number)
        assert not output.exists()
        assert lines() >= before + 3
        before = lines()
        assert all(json.loads(line) for line in journal.read_bytes().split(b"\n")[: before - 1])
        if number != signal.SIGKILL:
            said = (tmp_path / log).read_text().strip().splitlines()[-1]
            assert said == f"interrupted: {before - 1} of {PROMPTS} answers are in {journal}; the same command resumes"
            assert "Traceback" not in (tmp_path / log).read_text()
    assert main([*arguments, "--quiet", "--output", str(output)]) == 0
    assert not journal.exists()
    assert main([*arguments, "--quiet", "--output", str(tmp_path / "whole.jsonl")]) == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
