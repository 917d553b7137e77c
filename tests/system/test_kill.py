"""A run that is killed again and again ends with the same bits as one that is left alone."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.distributed.training_runs import metrics_of, weights_of
from tests.system.processes import SMALL, training

STEPS, KILLS = 40, 10
COMMAND = (
    "--config-name",
    "lmpo_tiny",
    *SMALL,
    "run_dir=run",
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=6",
    "checkpoint.save_interval=2",
)


def finish(directory: Path) -> None:
    """Let the command run to its end."""
    with training(COMMAND, directory) as process:
        process.join(timeout=150)
        assert process.exitcode == 0, (directory / "output").read_text()


def num_lines(directory: Path) -> int:
    path = directory / "run" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def being_written(directory: Path) -> set[str]:
    """Checkpoints that are not whole."""
    return {path.name for path in (directory / "run" / "checkpoints").glob("*.tmp")}


def kill_at_random(process: Any, directory: Path, rng: random.Random, *, while_saving: bool) -> None:
    """Kill -9 soon after a few steps (or none: while it starts), or after a checkpoint began to be written."""
    lines, left_over, steps = num_lines(directory), being_written(directory), rng.randrange(4)
    deadline = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline:
        if being_written(directory) - left_over if while_saving else num_lines(directory) - lines >= steps:
            break
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.1 if while_saving else 0.4))
    assert process.is_alive(), "it ended before it was killed: " + (directory / "output").read_text()
    process.kill()
    process.join()


def working_in(directory: Path) -> list[psutil.Process]:
    """Processes that killed runs left behind."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(directory) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.slow
def test_killed_ten_times_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    finish(whole)
    rng = random.Random(20)
    killed_while_saving = 0
    for attempt in range(KILLS):
        with training(COMMAND, killed) as process:
            kill_at_random(process, killed, rng, while_saving=attempt % 2 == 0)
        killed_while_saving += bool(being_written(killed))
    assert killed_while_saving > 0, "no kill came while a checkpoint was written"
    finish(killed)
    assert metrics_of(killed / "run") == metrics_of(whole / "run")
    found, expected = weights_of(killed / "run", STEPS), weights_of(whole / "run", STEPS)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert not being_written(killed)
    assert not working_in(killed)


def writer_at_work(process: Any, directory: Path) -> psutil.Process:
    """A process that writes a checkpoint in the background, stopped while it does."""
    while process.is_alive():
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any(Path(file.path).is_relative_to(directory) for file in child.open_files() if ".tmp" in file.path):
                    child.suspend()
                    return child
    raise AssertionError((directory / "output").read_text())


def test_a_killed_run_leaves_no_process_behind(tmp_path: Path) -> None:
    options = ("checkpoint.async_save=true", "checkpoint.save_interval=1", "trainer.max_steps=2000")
    with training((*COMMAND, *options), tmp_path) as process:
        writer = writer_at_work(process, tmp_path)
        family = [*psutil.Process(process.pid).children(recursive=True), writer]
        process.kill()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive, alive
