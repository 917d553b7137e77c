"""How a comparison ends its runs when it is asked to end."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.paper.comparison import execute
from nemo_lmpo.paper.comparison.runs import RunPlan
from nemo_lmpo.paper.comparison.scales import TINY
from nemo_lmpo.paper.comparison.suites import LMPO
from nemo_lmpo.runtime.interruption import Interrupted, raising_when_interrupted


class Run:
    """A process that saves for as long as others have not been asked to."""

    events: list[str]
    asked: int

    def __init__(self, target: object, args: tuple[RunPlan, ...]) -> None:
        self.name = str(args[0].seed)
        self.sentinel, self._end = os.pipe()
        self.exitcode = None

    def start(self) -> None:
        self.events.append(f"start {self.name}")
        if len(self.events) == 2:  # SIGTERM comes once both work
            # To the thread that waits: raised in another one, it would not wake it.
            main = threading.main_thread().ident
            threading.Timer(0.1, signal.pthread_kill, [main, signal.SIGTERM]).start()

    def terminate(self) -> None:
        self.events.append(f"terminate {self.name}")

    def join(self) -> None:
        self.events.append(f"join {self.name}")


def test_all_runs_are_asked_before_any_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the whole time of its scheduler to save."""
    Run.events = []

    class Context:
        Process = Run

    monkeypatch.setattr(execute, "_process_context", lambda scale: Context)
    plans = [RunPlan(LMPO, "lmpo_tiny", (), seed, tmp_path / str(seed), 1) for seed in (1, 2, 3)]
    with pytest.raises(Interrupted), raising_when_interrupted():
        execute.execute(plans, TINY, jobs=2, quiet=True)
    assert Run.events == ["start 1", "start 2", "terminate 1", "terminate 2", "join 1", "join 2"]


def test_torchrun_is_asked_to_end_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    class Launcher:
        def __init__(self, command: list[str]) -> None:
            events.append(command[1:3])

        def __enter__(self) -> Launcher:
            return self

        def __exit__(self, *_: object) -> None:
            events.append("closed")

        def wait(self) -> int:
            if len(events) == 1:
                signal.raise_signal(signal.SIGTERM)
            events.append("waited")
            return 0

        def terminate(self) -> None:
            events.append("terminated")

    monkeypatch.setattr(subprocess, "Popen", Launcher)
    plan = RunPlan(LMPO, "lmpo_llama3_8b", (), 1, tmp_path, 4)
    assert execute._train_separately(plan) == 128 + signal.SIGTERM
    assert events == [["--nproc-per-node", "4"], "terminated", "waited", "closed"]
