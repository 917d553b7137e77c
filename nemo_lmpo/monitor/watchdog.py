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
from collections.abc import Iterator
from contextlib import contextmanager

from nemo_lmpo.runtime.threads import timer

EXIT_STATUS = 70
"""Of a process that hung (`EX_SOFTWARE`): neither success nor a refused configuration."""
_GRACE_SECONDS = 30.0

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


def _give_up(what: str, seconds: float) -> None:
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    message = (
        f"error: {what} on rank {rank} has taken more than trainer.step_timeout={seconds:g} seconds; this process "
        f"stands here:\n"
    )
    if (stream := sys.__stderr__) is not None:
        stream.write(message)
        stream.flush()
        faulthandler.dump_traceback(file=stream, all_threads=True)
        stream.flush()
    os._exit(EXIT_STATUS)
