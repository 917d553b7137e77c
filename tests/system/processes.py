"""The training command in processes of its own, without a fresh Python each time.

They are forked from the fork server of the distributed tests, which has the heavy imports; from there on they are
what `python -m nemo_lmpo.train` is: they get the arguments, own their signals, and leave an exit status.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import signal
import sys
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.distributed.workers import _context

SMALL = (
    "model.architecture.hidden_size=64",
    "model.architecture.intermediate_size=128",
    "model.architecture.num_hidden_layers=2",
    "model.global_batch_size=12",
    "data.validation.limit=10",
    "logging.tensorboard=false",
    "logging.report=false",
    "logging.progress_bar=false",
    "trainer.num_threads=1",
)


def _run_command(
    arguments: Sequence[str],
    directory: str,
    output: str,
    own_group: bool,
    environment: dict[str, str],
    terminal: str,
    command: str,
) -> None:
    import torch

    if own_group:
        os.setpgid(0, 0)
    os.environ.update(environment)

    torch.set_num_threads(1)
    os.chdir(directory)
    # As started from a terminal, also where the tests were not: a background job's children ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if terminal:
        os.setsid()
        file = os.open(terminal, os.O_RDWR)
        fcntl.ioctl(file, termios.TIOCSCTTY, 0)
        os.dup2(file, 0)
    else:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    main = importlib.import_module(command).main
    sys.exit(main(arguments))


@contextmanager
def training(
    arguments: Sequence[str],
    directory: Path,
    *,
    own_group: bool = False,
    environment: dict[str, str] | None = None,
    terminal: str = "",
    output: str = "output",
    command: str = "nemo_lmpo.train",
) -> Iterator[Any]:
    """A process that runs the command with ``directory`` as its working directory; ended at the latest on exit.

    ``own_group`` makes it the leader of a process group, ``terminal`` (a path) a session's on that terminal. What it
    prints is appended to ``directory / output``, or shown by the terminal.
    """
    process = _context().Process(
        target=_run_command,
        args=(
            list(arguments),
            str(directory),
            str(directory / output),
            own_group,
            environment or {},
            terminal,
            command,
        ),
    )
    process.start()
    try:
        yield process
    finally:
        if process.is_alive():
            process.kill()
        process.join()
