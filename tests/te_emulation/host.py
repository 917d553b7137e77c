"""A process that imports Transformer Engine and megatron-core once and forks the workers of every run.

Apart from the fork server of the other tests, where megatron-core was imported without Transformer Engine.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.workers import PRELOAD, WorkerError, run_workers

VARIABLE = "NEMO_LMPO_TE_PYTHON"
FOLDER = ".te-python"
PACKAGES = "constraints-te.txt"
MISSING = (
    f"Transformer Engine's Python is not installed (pip install --no-deps --target {FOLDER} -r {PACKAGES}, or make "
    f"te-python; {VARIABLE} names another folder)"
)
_ROOT = Path(__file__).resolve().parent.parent.parent
_PR_SET_PDEATHSIG = 1
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",  # else the fused parts of layers would be compiled anew in every worker
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # as nemo_lmpo.train sets it
}


def find_python() -> Path | None:
    """The folder with Transformer Engine's Python, if there is one."""
    folder = Path(os.environ.get(VARIABLE) or _ROOT / FOLDER)
    return folder if (folder / "transformer_engine" / "pytorch" / "__init__.py").exists() else None


def _serve(pipe: Any, folder: Path) -> None:
    """Answer ``(world size, function, arguments)`` for as long as the tests run."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    from tests.te_emulation.emulation import install

    install(folder)
    for name in PRELOAD:
        importlib.import_module(name)
    fork = multiprocessing.get_context("fork")
    while True:
        world_size, function, arguments = pipe.recv()
        try:
            pipe.send((True, run_workers(world_size, function, *arguments, context=fork)))
        except WorkerError as error:
            pipe.send((False, str(error)))


class Host:
    """The process, from the side of the tests."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, folder))
        with pytest.MonkeyPatch.context() as environment:
            for name, value in _ENVIRONMENT.items():
                environment.setenv(name, value)
            self._process.start()
        theirs.close()

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Results of ``function(launch, *arguments)`` of every rank, in rank order.

        Raises:
            WorkerError: a rank failed; holds its traceback.
        """
        self._pipe.send((world_size, function, arguments))
        try:
            finished, result = self._pipe.recv()
        except EOFError:
            raise WorkerError("the process with Transformer Engine ended; its error is above") from None
        if not finished:
            raise WorkerError(result)
        return result  # type: ignore[no-any-return]

    def stop(self) -> None:
        """End the process, which has nothing to lose."""
        self._process.kill()
        self._process.join()
        self._pipe.close()
