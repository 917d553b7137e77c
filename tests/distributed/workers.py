"""Runs a function in several processes that talk over gloo.

A fork server imports the heavy packages once; workers are forked from it, so each costs a fraction of a second.
Processes of one run meet through a file: there are no ports to collide. The first failing rank's traceback is
raised here and the others are killed; workers die with the test process too.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.runtime.launch import LaunchInfo

PRELOAD = ["tests.distributed.preload"]
_PR_SET_PDEATHSIG = 1


class WorkerError(AssertionError):
    """A rank failed; holds its traceback."""


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with pytest.MonkeyPatch.context() as environment:  # of the server only
        environment.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()
    return context


def _work(pipe: Any, launch: LaunchInfo, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setpgid(0, 0)  # so that killing the rank takes its checkpoint writers along
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send(("ok", function(launch, *arguments)))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
    pipe.close()


def run_workers(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 150.0, context: Any = None
) -> list[Any]:
    """Results of ``function(launch, *arguments)`` of every rank, in rank order.

    ``context`` starts the processes, if not the fork server.
    """
    context = context or _context()
    with tempfile.TemporaryDirectory(prefix="nemo_lmpo_store_") as folder:
        store = str(Path(folder) / "store")
        pipes, processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            launch = LaunchInfo(rank, world_size, rank, world_size, store)
            process = context.Process(target=_work, args=(theirs, launch, function, arguments))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                _end(process)


def _collect(pipes: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready: list[Any] = multiprocessing.connection.wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            raise WorkerError(f"ranks {sorted(waiting.values())} did not finish in time")
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                outcome, value = pipe.recv()
            except EOFError:
                raise WorkerError(f"rank {rank} ended without a result") from None
            if outcome == "error":
                raise WorkerError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _end(process: Any) -> None:
    process.join(timeout=0.5 if process.is_alive() else None)
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
        process.join()
    process.close()
