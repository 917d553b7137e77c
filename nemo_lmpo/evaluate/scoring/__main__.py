"""Runs a program of this folder: ``scoring NAME REQUEST ANSWER PARENT``.

REQUEST and ANSWER are paths of JSON files, PARENT is the number of the process that starts it: it ends with that one.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Be killed when the parent ends, however it ends (Linux); the same for processes that this one forks."""
    if sys.platform != "linux":
        return
    prctl = ctypes.CDLL(None).prctl

    def follow(number: int) -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != number:  # it ended before it could be followed
            os._exit(1)

    follow(parent)
    me = os.getpid()
    os.register_at_fork(after_in_child=lambda: follow(me))


def main() -> None:
    """Read the request, write the answer."""
    name, asked, answered, parent = sys.argv[1:]
    end_with_parent(int(parent))
    answer = importlib.import_module(name).answer(json.loads(Path(asked).read_text()))
    Path(answered).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
