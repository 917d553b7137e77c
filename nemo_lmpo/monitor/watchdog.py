"""Ends a step that hangs, so that a job is started again instead of waiting out its time."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_STATUS = 70
"""Of a process whose step hung (`EX_SOFTWARE`): neither success nor a refused configuration."""
_GRACE_SECONDS = 30.0


@contextmanager
def watched(what: str, seconds: float | None) -> Iterator[None]:
    """End this process if the block takes longer than ``seconds``, after showing where every thread stands.

    Every rank watches itself: those that wait for a rank that hangs show that they wait, and for what.

    Args:
        what: the block, for the message, as `step 12 on rank 3`.
        seconds: None: no limit.
    """
    stream = sys.__stderr__
    if seconds is None or stream is None:
        yield
        return
    timer = threading.Timer(seconds, _give_up, (what, seconds))
    timer.daemon = True
    timer.start()
    # A call that holds Python's lock also holds the timer; this one is a thread that needs no lock.
    faulthandler.dump_traceback_later(seconds + _GRACE_SECONDS, exit=True, file=stream)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def _give_up(what: str, seconds: float) -> None:
    message = f"error: {what} has taken more than trainer.step_timeout={seconds:g} seconds; this process stands here:\n"
    if (stream := sys.__stderr__) is not None:
        stream.write(message)
        stream.flush()
        faulthandler.dump_traceback(file=stream, all_threads=True)
        stream.flush()
    os._exit(EXIT_STATUS)
