"""Helper processes that end with the run, however it ends. Imports no torch, so they start fast."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing.managers import SyncManager
from typing import Any

_PR_SET_PDEATHSIG = 1


def follow_parent(parent: int) -> None:
    """Make this process die with ``parent``, and leave signals that ask to stop to it.

    A scheduler sends its warning to every process of the job; the parent then still saves, for which it needs
    its helpers.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _die_with(parent)


def _die_with(parent: int) -> None:
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could be followed
        os._exit(1)


def following_queue() -> Any:
    """A queue between processes, served by a process that :func:`follow_parent`."""
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(follow_parent, (os.getpid(),))
    return manager.Queue()


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
