"""Runs a command of the half-hour in a process of its own, for a limited time, with its output in a file."""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO

TIMED_OUT = 124
"""The status of a command that took too long, as of `timeout`."""
_LOOK_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1

Execute = Callable[[Sequence[str], Mapping[str, str], Path, float], int]
"""Command, environment, output, seconds; the exit status."""


def execute(command: Sequence[str], environment: Mapping[str, str], output: Path, seconds: float) -> int:
    """Run `python COMMAND`."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_this_process,
        )
        return _wait(process.pid, seconds)


def rehearse(command: Sequence[str], environment: Mapping[str, str], output: Path, seconds: float) -> int:
    """The same as a fork of this process, which has the rehearsal's GPU and all that takes long to import."""
    sys.stdout.flush()
    with output.open("wb") as file:
        pid = os.fork()
        if pid == 0:
            os._exit(_become(command, environment, file))
        return _wait(pid, seconds)


def _become(command: Sequence[str], environment: Mapping[str, str], output: IO[bytes]) -> int:
    """In the fork: what `python COMMAND` does, and its exit status."""
    status: object = 1
    try:
        os.setsid()
        _end_with_this_process()
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        os.environ.update(environment)
        with _counted_memory(command):
            if command[0] == "-m":
                sys.argv = list(command[1:])
                runpy.run_module(command[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = list(command)
                runpy.run_path(command[0], run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = ended.code
        if isinstance(status, str):
            print(status)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else 0 if status is None else 1


def _counted_memory(command: Sequence[str]) -> AbstractContextManager[object]:
    """What a program says of memory is counted where it is the point; a look at every tensor takes its time."""
    from tests.rehearsal.install import install
    from tests.rehearsal.tensors import LiveBytes

    return LiveBytes(install()) if command[0].endswith("one_rank.py") else nullcontext()


def _end_with_this_process() -> None:
    """In the child: end when the half-hour is killed, so that it does not work beside the next attempt."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(pid: int, seconds: float) -> int:
    """The status of a process, which is ended with all that it started when the time is over."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(_LOOK_SECONDS)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return TIMED_OUT
