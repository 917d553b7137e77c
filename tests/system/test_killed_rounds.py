"""Rounds that are killed while they train, and asked to end while they sample: the same command goes on."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.system.processes import training
from tests.system.rounds_runs import TRAINING, assert_same_run, command, commands_in, num_lines, save_inputs

PATIENCE = 350.0


def wait_for(condition: Callable[[], bool], process: Any, directory: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.is_alive(), (directory / "output").read_text()
        assert time.monotonic() < deadline, (directory / "output").read_text()
        time.sleep(0.002)


def is_running(word: str, rounds: Any) -> bool:
    """Whether a stage of the rounds has this word on its command line."""
    with contextlib.suppress(psutil.Error):
        return any(word in stage.cmdline() for stage in psutil.Process(rounds.pid).children())
    return False


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_training_goes_on_and_nothing_is_left_running(tmp_path: Path) -> None:
    save_inputs(tmp_path)
    rounds = command(tmp_path, rounds=1, limit=12)
    folder = tmp_path / "work"
    folder.mkdir()
    run, pairs = folder / "out" / "round_1" / "run", folder / "out" / "round_1" / "pairs"
    with training(rounds, folder, command="nemo_lmpo.rounds.__main__") as process:
        wait_for(lambda: num_lines(run / "metrics.jsonl") >= 2, process, folder)
        assert is_running("nemo_lmpo.train", process)
        stages = psutil.Process(process.pid).children()
        process.kill()
        process.join()
        # Not killed but asked, so that it saves; the next command would be refused as long as it runs.
        psutil.wait_procs(stages, timeout=PATIENCE)
    assert not commands_in(folder)
    made = (pairs / "pairs.jsonl").read_bytes()
    with training(rounds, folder, command="nemo_lmpo.rounds.__main__") as process:
        wait_for((folder / "out" / "rounds.json").is_file, process, folder)
        wait_for(lambda: is_running("--until", process), process, folder)
        process.terminate()
        process.join(timeout=PATIENCE)
    said = (folder / "output").read_text()
    assert process.exitcode == 128 + signal.SIGTERM, said
    assert said.rstrip().splitlines()[-1] == "interrupted: run the same command to resume"
    assert "Traceback" not in said
    assert not commands_in(folder)
    assert (pairs / "pairs.jsonl").read_bytes() == made
    given = [f"model.restore_from_path={tmp_path}/policy", f"data.train.path={pairs}", f"run_dir={tmp_path}/whole"]
    with training(["--config-name", "lmpo_tiny", *TRAINING, *given], tmp_path) as process:
        process.join(timeout=PATIENCE)
        assert process.exitcode == 0, (tmp_path / "output").read_text()
    assert_same_run(run, tmp_path / "whole")
