"""Helper processes that end with the run, however it ends. Imports no torch, so they start fast."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing.managers import SyncManager
from typing import Any

_PR_SET_PDEATHSIG = 1


def follow_parent(parent: int) -> None:
    """Make this process die with ``parent``, and leave signals that ask to stop to it.

    A scheduler sends its warning to every process of the job; the parent then still saves, for which it needs
    its helpers.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
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
