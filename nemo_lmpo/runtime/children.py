"""Processes that end with the one that started them, however it ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

_PR_SET_PDEATHSIG = 1


def _die_with(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before it could be followed
        os._exit(1)


def start_following(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a command that is asked to end (SIGTERM) when this process ends, even by a kill.

    It has a process group of its own: Ctrl-C in a terminal reaches this process alone, which passes on one signal. Two
    would end the command before it has saved. Start it from the main thread: Linux ties the command to the thread.
    """
    parent = os.getpid()
    return subprocess.Popen(command, process_group=0, preexec_fn=lambda: _die_with(parent, signal.SIGTERM))


class _Forks:
    """Whether processes that are forked now die with this one."""

    def __init__(self) -> None:
        self.follow = False
        self.registered = False
        self.parent = 0

    def before(self) -> None:
        self.parent = os.getpid()

    def in_child(self) -> None:
        if self.follow:
            _die_with(self.parent)


_FORKS = _Forks()


@contextlib.contextmanager
def following_forks() -> Iterator[None]:
    """Within the block, forked processes (and those that they fork) die with this process.

    Without it a killed run can leave a writer that waits for ever on a lock which the run held, with a copy of the
    run's memory. Fork from the main thread only: Linux ties the children to the thread.
    """
    if not _FORKS.registered:
        os.register_at_fork(before=_FORKS.before, after_in_child=_FORKS.in_child)
        _FORKS.registered = True
    _FORKS.follow = True
    try:
        yield
    finally:
        _FORKS.follow = False
