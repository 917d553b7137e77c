"""Rounds killed, and asked to end, in every stage of every round: the same command ends with the same bits."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.system.rounds_runs import assert_same_rounds, command, commands_in, num_lines, save_inputs

ROUNDS, LIMIT, PATIENCE = 2, 24, 600.0
Condition = Callable[[Path], bool]


def rows(journal: str, least: int) -> Condition:
    return lambda folder: num_lines(folder / "work" / journal) >= least


def half_written(folder: Path) -> bool:
    """Pairs are there, their summary is not."""
    return (folder / "pairs.jsonl").is_file() and not (folder / "pairs.json").is_file()


def steps(least: int) -> Condition:
    return lambda folder: num_lines(folder / "metrics.jsonl") >= least


def saving(folder: Path) -> bool:
    """The second checkpoint is being written, or just there."""
    return any((folder / "checkpoints").glob("step_0000004*"))


KILL, TERM = signal.SIGKILL, signal.SIGTERM
POINTS: list[tuple[str, signal.Signals, Condition]] = [
    ("round_1/pairs", KILL, lambda folder: (folder / "work").is_dir()),
    ("round_1/pairs", TERM, rows("samples.jsonl", 17)),
    ("round_1/pairs", KILL, rows("scores.jsonl", 1)),
    ("round_1/pairs", KILL, half_written),
    ("round_1/run", KILL, steps(1)),
    ("round_1/run", TERM, steps(3)),
    ("round_2/pairs", KILL, rows("samples.jsonl", 1)),
    ("round_2/pairs", KILL, rows("samples.jsonl", 72)),
    ("round_2/pairs", TERM, rows("scores.jsonl", 6)),
    ("round_2/pairs", TERM, half_written),
    ("round_2/run", KILL, Path.is_dir),
    ("round_2/run", KILL, saving),
    ("round_2/run", KILL, steps(6)),
    ("last", TERM, rows("samples.jsonl", 1)),
]
"""Where each command is ended, in the order of the work: every stage, half of them in each round."""


def start(inputs: Path, folder: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "nemo_lmpo.rounds", *command(inputs, ROUNDS, LIMIT)]
    with (folder / "output").open("ab") as output:
        return subprocess.Popen(words, cwd=folder, stdout=output, stderr=output)


@pytest.mark.timeout(7200)
def test_rounds_that_are_ended_in_every_stage_come_out_the_same(tmp_path: Path) -> None:
    save_inputs(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert start(tmp_path, whole).wait() == 0, (whole / "output").read_text()
    ended, passed = [], []
    for place, number, reached in POINTS:
        if reached(killed / "out" / place):
            passed.append((place, number))  # the command before was faster than its end
            continue
        process = start(tmp_path, killed)
        deadline = time.monotonic() + PATIENCE
        while not reached(killed / "out" / place):
            assert process.poll() is None, (killed / "output").read_text()
            assert time.monotonic() < deadline, (killed / "output").read_text()
            time.sleep(0.001)
        stages = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        assert process.wait(PATIENCE) == (-KILL if number == KILL else 128 + TERM), (killed / "output").read_text()
        _, alive = psutil.wait_procs(stages, timeout=PATIENCE)
        assert not alive
        assert not commands_in(killed)
        ended.append((place, number))
    assert len(ended) > len(POINTS) * 2 // 3, (ended, passed)
    assert start(tmp_path, killed).wait() == 0, (killed / "output").read_text()
    said = (killed / "output").read_text()
    assert "Traceback" not in said, said
    assert_same_rounds(killed / "out", whole / "out", ROUNDS)
    print(f"ended at {len(ended)} points: {ended}; passed: {passed}")
