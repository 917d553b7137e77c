"""Ends a process that hangs where it works together with others, so that a job is started again instead of waiting out
its time.

There is one watchdog for everything in which ranks wait for each other: :func:`watched` stands around each training
step, and each unit of what takes longer than one: a batch of a validation or of a reference pass, a token of sampled
answers, loading, a save.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from nemo_lmpo.runtime import run_files
from nemo_lmpo.runtime.flight_recorder import PREFIX, dump_collectives
from nemo_lmpo.runtime.launch import several_ranks
from nemo_lmpo.runtime.threads import timer

EXIT_STATUS = 70
"""Of a process that hung (`EX_SOFTWARE`): neither success nor a refused configuration."""
_GRACE_SECONDS = 30.0
_LINGER_SECONDS = 5.0

_DIRECTORIES: list[Path] = []
"""Where hangs are kept; of blocks within blocks the innermost counts."""

_PHASES: list[tuple[str, float | None]] = []
"""What the main thread is in, with the seconds that it may take, the outermost first."""
_TIMERS: list[threading.Timer] = []
"""That of the innermost one."""


@contextmanager
def watched(what: str, seconds: float | None) -> Iterator[None]:
    """End this process if the block takes longer than ``seconds``, after showing where every thread stands.

    Every rank watches itself: those that wait for a rank that hangs show that they wait, and for what. Of blocks within
    blocks the innermost counts; when it ends, the time of the one around it begins anew.

    Args:
        what: the block, for the message, as `step 12`.
        seconds: None: no limit.
    """
    _PHASES.append((what, seconds))
    _watch_innermost()
    try:
        yield
    finally:
        _PHASES.pop()
        _watch_innermost()


def go_on() -> None:
    """The innermost block got something done: its time begins anew."""
    _watch_innermost()


def _watch_innermost() -> None:
    """Begin the innermost block's time; without one, or without a limit, nothing is watched."""
    if _TIMERS:
        _TIMERS.pop().cancel()
        faulthandler.cancel_dump_traceback_later()
    what, seconds = _PHASES[-1] if _PHASES else ("", None)
    if seconds is None or sys.__stderr__ is None:
        return
    _TIMERS.append(timer(seconds, _give_up, what, seconds))
    # A call that holds Python's lock also holds the timer; this one is a thread that needs no lock.
    faulthandler.dump_traceback_later(seconds + _GRACE_SECONDS, exit=True, file=sys.__stderr__)


@contextmanager
def reporting_hangs_in(directory: Path) -> Iterator[None]:
    """Keep there, too, what a hang within the block shows: the stacks and the last collectives of every rank."""
    _DIRECTORIES.append(directory)
    try:
        yield
    finally:
        _DIRECTORIES.pop()


def _give_up(what: str, seconds: float) -> None:
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    message = f"error: {what} on rank {rank} has taken more than trainer.step_timeout={seconds:g} seconds; "
    if (stream := sys.__stderr__) is not None:
        stream.write(f"{message}this process stands here:\n")
        stream.flush()
        faulthandler.dump_traceback(file=stream, all_threads=True)
        stream.flush()
        # A file system that hangs, too, does not keep the process: the timer without a lock is still there.
        with suppress(OSError, RuntimeError):
            _keep(message, rank, stream)
        stream.flush()
    if several_ranks():
        # The first one that ends makes the launcher end the others, which are about to say where they stand.
        time.sleep(_LINGER_SECONDS)
    os._exit(EXIT_STATUS)


def _keep(message: str, rank: int, stream: TextIO) -> None:
    """Write this rank's files, and name them."""
    if not _DIRECTORIES:
        return
    directory = _DIRECTORIES[-1]
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{run_files.STACKS}{rank}.txt").open("w") as file:
        file.write(f"{message}this process stood here:\n")
        file.flush()
        faulthandler.dump_traceback(file=file, all_threads=True)
    stream.write(f"the stacks of all ranks are kept in {directory}\n")
    if several_ranks() and (path := dump_collectives(directory, rank)) is not None:
        compare = f"`torchfrtrace --prefix {PREFIX} {directory}` compares those of all ranks where NCCL made them"
        stream.write(f"rank {rank}'s last collectives are in {path}; {compare}\n")
