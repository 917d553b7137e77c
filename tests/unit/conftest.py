"""Unit tests stay in this process: what starts an interpreter or a program belongs to tests/system or
tests/distributed, or says why not by its marker. Forks are left alone: megatron-core's checkpoint writers are forked.
"""

from __future__ import annotations

import subprocess
from multiprocessing.context import ForkServerProcess, SpawnProcess
from typing import NoReturn

import pytest
import torch  # noqa: F401  (its first import may ask ldconfig for libraries)


def _refuse(*arguments: object, **names: object) -> NoReturn:
    raise AssertionError("a unit test starts a process; move it to tests/system or tests/distributed")


@pytest.fixture(autouse=True)
def no_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("processes"):
        return
    monkeypatch.setattr(subprocess.Popen, "__init__", _refuse)
    for process in (SpawnProcess, ForkServerProcess):
        monkeypatch.setattr(process, "_Popen", _refuse)
