"""When one of several ranks ends or hangs, the others say which one to look at, in one sentence."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.runtime.run_files import saved_steps
from tests.system.processes import SMALL, training

COMMAND = (
    "--config-name",
    "lmpo_tiny",
    *SMALL,
    "run_dir=run",
    "trainer.max_steps=100000",
    "trainer.val_check_interval=0",
    "checkpoint.save_interval=3",
    "data.validation.path=null",
)


@contextmanager
def two_ranks(directory: Path, *overrides: str, of_second: tuple[str, ...] = ()) -> Iterator[list[Any]]:
    """Two processes with torchrun's variables; rank ``n`` prints to ``output<n>``."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with ExitStack() as stack:
        ranks = []
        for rank in (0, 1):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = (*COMMAND, *overrides, *(of_second if rank else ()))
            context = training(command, directory, environment=environment, output=f"output{rank}")
            ranks.append(stack.enter_context(context))
        yield ranks


def wait_for_steps(ranks: list[Any], directory: Path, steps: int) -> None:
    path = directory / "run" / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < steps:
        assert all(rank.is_alive() for rank in ranks), (directory / "output0").read_text()
        time.sleep(0.01)


def the_message(directory: Path, rank: int) -> str:
    output = (directory / f"output{rank}").read_text()
    assert "Traceback" not in output, output
    (line,) = (line for line in output.splitlines() if line.startswith("error: "))
    return line


@pytest.mark.parametrize(("killed", "layout"), [(1, ""), (0, "model.tensor_model_parallel_size=2")])
def test_a_killed_rank_is_named(killed: int, layout: str, tmp_path: Path) -> None:
    with two_ranks(tmp_path, *([layout] if layout else [])) as ranks:
        wait_for_steps(ranks, tmp_path, 4)
        pid = ranks[killed].pid
        ranks[killed].kill()
        ranks[killed].join()
        ranks[1 - killed].join(timeout=60)
        assert ranks[1 - killed].exitcode == 1
    message = the_message(tmp_path, 1 - killed)
    assert f"rank {killed} (process {pid} on {socket.gethostname()}) has ended without a word" in message
    assert "run the same command to resume" in message
    assert saved_steps(tmp_path / "run" / "checkpoints")


def test_a_rank_that_refuses_tells_the_others_why(tmp_path: Path) -> None:
    """Other pairs on one rank: both see it. A setting that only one rank has wrong: the other is told."""
    with two_ranks(tmp_path, of_second=("data.train.limit=60",)) as ranks:
        for rank in ranks:
            rank.join(timeout=60)
    for rank in (0, 1):
        assert ranks[rank].exitcode == 1
        assert "holds other pairs on rank 1" in the_message(tmp_path, rank)


def test_a_rank_that_fails_alone_is_quoted(tmp_path: Path) -> None:
    rows = ['{"prompt": "sort b a", "chosen": "a b", "rejected": "b a"}\n'] * 40
    (tmp_path / "pairs.jsonl").write_text("".join(rows))
    (tmp_path / "broken.jsonl").write_text("".join(rows) + "{broken\n")
    paths = [f"data.train.path={name}.jsonl" for name in ("pairs", "broken")]
    with two_ranks(tmp_path, paths[0], of_second=(paths[1],)) as ranks:
        for rank in ranks:
            rank.join(timeout=60)
    assert [rank.exitcode for rank in ranks] == [1, 1]
    assert "broken.jsonl" in the_message(tmp_path, 1)
    assert "rank 1 (process" in the_message(tmp_path, 0)
    assert "has ended: broken.jsonl" in the_message(tmp_path, 0)


def test_a_stopped_rank_is_named_when_the_time_is_over(tmp_path: Path) -> None:
    with two_ranks(tmp_path, "trainer.distributed_timeout=0.1", "trainer.step_timeout=null") as ranks:
        wait_for_steps(ranks, tmp_path, 2)
        os.kill(ranks[1].pid, signal.SIGSTOP)
        ranks[0].join(timeout=60)
        assert ranks[0].exitcode == 1
        os.kill(ranks[1].pid, signal.SIGCONT)
        ranks[1].join(timeout=60)
    assert f"rank 1 (process {ranks[1].pid} on {socket.gethostname()}) is stopped" in the_message(tmp_path, 0)
    assert "rank 0 (process" in the_message(tmp_path, 1)
