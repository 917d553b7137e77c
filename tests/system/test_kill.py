"""A run that is killed again and again ends with the same bits as one that is left alone."""

from __future__ import annotations

import contextlib
import json
import random
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.distributed.test_conversations import conversations
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


def sft_command(folder: Path, *more: str) -> tuple[str, ...]:
    """SFT on conversations of one to three turns, which each run tokenizes for itself."""
    lines = [json.dumps(row) + "\n" for row in conversations(60)]
    for name, part in (("train", lines), ("validation", lines[:10])):
        (folder / f"{name}.jsonl").write_text("".join(part))
    paths = (f"data.{name}.path={folder / name}.jsonl" for name in ("train", "validation"))
    lengths = ("data.max_length=80", "data.max_prompt_length=40", "data.validation.split=train", "data.cache_dir=cache")
    every = ("trainer.val_check_interval=4", "checkpoint.save_interval=2")
    return ("--config-name", "sft_tiny", *SMALL, "run_dir=run", *paths, *lengths, *every, *more)


def finish(directory: Path, command: tuple[str, ...] = COMMAND) -> None:
    """Let the command run to its end."""
    with training(command, directory) as process:
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


def assert_alike(killed: Path, whole: Path, steps: int) -> None:
    """What a killed run ends with are the bits of one that was left alone, and nothing else is left of it."""
    assert metrics_of(killed / "run") == metrics_of(whole / "run")
    found, expected = weights_of(killed / "run", steps), weights_of(whole / "run", steps)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert not being_written(killed)
    assert not working_in(killed)


def kill_and_compare(command: tuple[str, ...], tmp_path: Path, *, steps: int, kills: int, seed: int) -> None:
    """Kill a run so often, every other time while it saves, and let it end as another one that is left alone."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    finish(whole, command)
    rng = random.Random(seed)
    killed_while_saving = 0
    for attempt in range(kills):
        with training(command, killed) as process:
            kill_at_random(process, killed, rng, while_saving=attempt % 2 == 0)
        killed_while_saving += bool(being_written(killed))
    assert killed_while_saving > 0, "no kill came while a checkpoint was written"
    finish(killed, command)
    assert_alike(killed, whole, steps)


@pytest.mark.slow
def test_killed_ten_times_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    kill_and_compare(COMMAND, tmp_path, steps=STEPS, kills=KILLS, seed=20)


def test_sft_on_conversations_killed_and_resumed(tmp_path: Path) -> None:
    kill_and_compare(sft_command(tmp_path, "trainer.max_steps=12"), tmp_path, steps=12, kills=2, seed=4)


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
