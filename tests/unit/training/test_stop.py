"""When a run stops before its last step."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from nemo_lmpo.config.rules.settings import parse_duration
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.training.stop import StopCondition

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(None, None), ("02:30", 150), ("03:45:00", 13500), ("01:00:00:05", 86405), ("00:00", 0), ("100:00:00", 360000)],
)
def test_durations(text: str | None, seconds: float | None) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["90", "4h", "1:2:3:4:5", "", "12:", ":30", "1.5:00", "-1:00"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"trainer.max_time_per_run=.* is not a duration; write DD:HH:MM:SS"):
        parse_duration(text)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_noted_and_handlers_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopCondition(None, started=time.time()) as stop:
        assert stop.reason(CPU) is None
        os.kill(os.getpid(), number)
        assert stop.reason(CPU) == number.name
    assert signal.getsignal(number) == before


def test_no_limit_never_stops() -> None:
    stop = StopCondition(None, started=0.0)
    stop.longest_step = stop.longest_save = 1e9
    assert stop.reason(CPU) is None


@pytest.mark.parametrize(
    ("passed", "validates", "stops"),
    # 100 s in all; a step takes 5, a save 20, a validation 30: a step must begin before 75 s, before 45 s with one.
    [(74, False, False), (76, False, True), (44, True, False), (46, True, True), (200, False, True)],
)
def test_time_is_kept_for_a_step_a_save_and_a_validation(passed: float, validates: bool, stops: bool) -> None:
    stop = StopCondition(100.0, started=time.time() - passed)
    stop.longest_step, stop.longest_save, stop.longest_validation = 5.0, 20.0, 30.0
    assert stop.reason(CPU, validates=validates) == ("time limit" if stops else None)


def test_the_earlier_limit_counts() -> None:
    now = time.time()
    assert StopCondition(1000.0, started=now, stop_at=now - 1).reason(CPU) == "time limit"
    assert StopCondition(1.0, started=now - 2, stop_at=now + 1000).reason(CPU) == "time limit"
    assert StopCondition(1000.0, started=now, stop_at=now + 1000).reason(CPU) is None


def test_a_signal_comes_before_the_time_limit() -> None:
    with StopCondition(0.0, started=time.time()) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.reason(CPU) == "SIGUSR1"
