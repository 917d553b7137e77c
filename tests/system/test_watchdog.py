"""A step that hangs ends with the stacks of its process; one that does not is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from nemo_lmpo.monitor import watchdog
from nemo_lmpo.monitor.watchdog import EXIT_STATUS, go_on, watched

PROGRAM = """
import sys, time
from nemo_lmpo.monitor import watchdog
{setup}
def where_it_hangs():
    {hang}
with watchdog.watched("step 12", 0.5):
    where_it_hangs()
print("went on")
"""


def run(hang: str, setup: str = "") -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(hang=hang, setup=setup)
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "RANK": "3"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_hanging_step_shows_where_it_stands_and_ends() -> None:
    result = run("time.sleep(50)")
    assert result.returncode == EXIT_STATUS
    assert "step 12 on rank 3 has taken more than trainer.step_timeout=0.5 seconds" in result.stderr
    assert "in where_it_hangs" in result.stderr
    assert "went on" not in result.stdout


def test_even_where_nothing_else_gets_to_run() -> None:
    """A call that keeps Python's lock, as a stuck kernel launch may."""
    result = run("import ctypes; ctypes.PyDLL(None).sleep(50)", setup="watchdog._GRACE_SECONDS = 0.5")
    assert result.returncode == 1
    assert "in where_it_hangs" in result.stderr


def test_others_go_on(capfd: pytest.CaptureFixture[str]) -> None:
    with watched("step 1", 0.2):
        pass
    with watched("step 2", None):
        time.sleep(0.3)
    assert capfd.readouterr().err == ""


def test_progress_and_what_is_within_begin_the_time_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[tuple[str, float]] = []

    class Timer:
        daemon = False

        def __init__(self, seconds: float, function: object, arguments: tuple[str, float]) -> None:
            self.arguments = arguments

        def start(self) -> None:
            running.append(self.arguments)

        def cancel(self) -> None:
            running.remove(self.arguments)

    monkeypatch.setattr(threading, "Timer", Timer)
    with watched("the export", 60.0):
        assert running == [("the export", 60.0)]
        first = watchdog._TIMERS[0]
        go_on()
        assert watchdog._TIMERS[0] is not first
        with watched("a part", 30.0):
            assert running == [("a part", 30.0)]
        assert running == [("the export", 60.0)]
        with watched("no limit", None):
            assert running == []
        assert running == [("the export", 60.0)]
    assert running == []
    with pytest.raises(ValueError, match="x"), watched("what fails", 60.0):
        raise ValueError("x")
    assert running == []
