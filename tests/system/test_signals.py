"""A scheduler's warning: the step is finished, everything is saved, and the status is 0."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.checkpoint.manifest import find_damage
from nemo_lmpo.runtime.run_files import saved_steps, step_directory
from tests.distributed.training_runs import metrics_of, weights_of
from tests.system.processes import SMALL, training

COMMAND = (
    "--config-name",
    "lmpo_tiny",
    *SMALL,
    "run_dir=run",
    "trainer.val_check_interval=0",
    "checkpoint.save_interval=0",
    "data.validation.path=null",
)


def wait_for_steps(process: Any, directory: Path, steps: int) -> None:
    path = directory / "run" / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < steps:
        assert process.is_alive(), (directory / "output").read_text()
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "options"), [("SIGTERM", ()), ("SIGUSR1", ("checkpoint.async_save=true",)), ("SIGINT", ())]
)
def test_saves_and_ends_well(number: str, options: tuple[str, ...], tmp_path: Path) -> None:
    with training((*COMMAND, *options, "trainer.max_steps=2000"), tmp_path) as process:
        wait_for_steps(process, tmp_path, 2)
        os.kill(process.pid, getattr(signal, number))
        process.join(timeout=60)
        output = (tmp_path / "output").read_text()
        assert process.exitcode == 0, output
    (step,) = saved_steps(tmp_path / "run" / "checkpoints")
    assert f"stopped by {number} after step {step}" in output
    assert find_damage(step_directory(tmp_path / "run" / "checkpoints", step)) is None
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == list(range(1, step + 1))


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    with training((*COMMAND, "trainer.max_steps=2000", "model.global_batch_size=512"), tmp_path) as process:
        wait_for_steps(process, tmp_path, 1)
        os.kill(process.pid, signal.SIGINT)
        while "Ctrl-C again ends it at once" not in (tmp_path / "output").read_text():
            assert process.is_alive()
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGINT)
        process.join(timeout=60)
    assert process.exitcode in (-signal.SIGINT, 0), "a step that ends in between is saved"
    assert "Traceback" not in (tmp_path / "output").read_text()


def test_ctrl_c_before_training_is_one_line(tmp_path: Path) -> None:
    with training((*COMMAND, "trainer.max_steps=2000"), tmp_path) as process:
        while not (tmp_path / "run" / "config.yaml").exists():
            assert process.is_alive(), (tmp_path / "output").read_text()
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGINT)
        process.join(timeout=60)
    output = (tmp_path / "output").read_text()
    assert "Traceback" not in output
    assert process.exitcode in (0, 130), output
    assert ("interrupted: run the same command" if process.exitcode else "stopped by SIGINT") in output


def test_a_terminal_that_goes_away_saves(tmp_path: Path) -> None:
    """What a dropped connection does: SIGHUP, and every later write to the terminal fails."""
    controller, terminal = os.openpty()
    command = (*COMMAND, "trainer.max_steps=2000", "logging.progress_bar=true")
    with training(command, tmp_path, terminal=os.ttyname(terminal)) as process:
        os.set_blocking(controller, False)
        while not (tmp_path / "run" / "metrics.jsonl").exists() or num_lines(tmp_path) < 2:
            assert process.is_alive()
            with contextlib.suppress(BlockingIOError):
                os.read(controller, 65536)
            time.sleep(0.01)
        os.close(terminal)
        os.close(controller)
        process.join(timeout=60)
        assert process.exitcode == 0
    (step,) = saved_steps(tmp_path / "run" / "checkpoints")
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == list(range(1, step + 1))


def num_lines(directory: Path) -> int:
    return (directory / "run" / "metrics.jsonl").read_bytes().count(b"\n")


def test_background_saving_survives_a_warning_to_the_whole_job(tmp_path: Path) -> None:
    """Schedulers signal every process of a job, also those that write the checkpoint."""
    options = ("checkpoint.async_save=true", "checkpoint.save_interval=1", "trainer.max_steps=2000")
    with training((*COMMAND, *options), tmp_path, own_group=True) as process:
        wait_for_steps(process, tmp_path, 4)
        os.killpg(process.pid, signal.SIGTERM)
        process.join(timeout=60)
        assert process.exitcode == 0, (tmp_path / "output").read_text()
    steps = saved_steps(tmp_path / "run" / "checkpoints")
    assert steps
    assert steps[-1] == metrics_of(tmp_path / "run")[-1]["step"]


def test_time_limit_and_going_on_equals_one_run(tmp_path: Path) -> None:
    """Stopped by the clock, then finished: the same weights as in one go."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for directory in (whole, parts):
        directory.mkdir()
    steps = 80
    length = f"trainer.max_steps={steps}"
    with training((*COMMAND, length), whole) as process:
        process.join(timeout=120)
        assert process.exitcode == 0, (whole / "output").read_text()
    seconds = 8
    started = time.monotonic()
    with training((*COMMAND, length, f"trainer.max_time_per_run='00:{seconds:02}'"), parts) as process:
        wait_for_steps(process, parts, 2)
        # However fast the machine, the limit falls between two steps: the process sleeps until it has passed.
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(max(0.0, started + seconds + 1 - time.monotonic()))
        os.kill(process.pid, signal.SIGCONT)
        process.join(timeout=120)
        assert process.exitcode == 0, (parts / "output").read_text()
    assert "stopped by time limit" in (parts / "output").read_text()
    assert 2 <= len(metrics_of(parts / "run")) < steps
    with training((*COMMAND, length), parts) as process:
        process.join(timeout=120)
        assert process.exitcode == 0, (parts / "output").read_text()
    assert metrics_of(parts / "run") == metrics_of(whole / "run")
    found, expected = weights_of(parts / "run", steps), weights_of(whole / "run", steps)
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
