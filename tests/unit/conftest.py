"""Unit tests stay in this process: what starts an interpreter or a program belongs to tests/system or
tests/distributed, or says why not by its marker. Forks are left alone: megatron-core's checkpoint writers are forked.
"""

from __future__ import annotations

import subprocess
import warnings
from multiprocessing.context import ForkServerProcess, SpawnProcess
from typing import NoReturn

import pytest
import torch  # noqa: F401  (its first import may ask ldconfig for libraries)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # megatron-core reports each missing GPU package
    import megatron.core  # noqa: F401  (its first import, in 0.19, asks git for a commit)


def _refuse(*arguments: object, **names: object) -> NoReturn:
    raise AssertionError("a unit test starts a process; move it to tests/system or tests/distributed")


@pytest.fixture(autouse=True)
def no_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("processes"):
        return
    monkeypatch.setattr(subprocess.Popen, "__init__", _refuse)
    for process in (SpawnProcess, ForkServerProcess):
        monkeypatch.setattr(process, "_Popen", _refuse)
