from __future__ import annotations

import io
import logging
import sys
from contextlib import closing, redirect_stderr

import pytest

from nemo_lmpo.config.schema import LoggingConfig
from nemo_lmpo.monitor.console import Console, format_duration, format_metrics

METRICS = {
    "loss": 0.51234,
    "rewards/accuracies": 0.8125,
    "rewards/margins": 1.5,
    "pairs_per_second": 12.345,
    "lr": 1e-6,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599, "59:59"), (3661, "1:01:01"), (2 * 86400 + 5, "2d 0:00:05")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_metrics_that_are_absent_are_left_out() -> None:
    assert format_metrics(METRICS) == "loss 0.5123  accuracy 0.812  margin 1.500  12.3 pairs/s"
    assert format_metrics({"loss": 2.0}) == "loss 2.0000"
    assert format_metrics({}) == ""


def test_lines_without_terminal_are_at_least_ten_seconds_apart(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    with closing(Console(LoggingConfig(), total_steps=30, stream=io.StringIO(), clock=clock)) as progress:
        for step in range(1, 31):
            clock.now += 4.0
            progress.update(step, METRICS)
    shown = [int(record.message.split()[1].split("/")[0]) for record in caplog.records]
    # The first, then every third (12 seconds), then the last.
    assert shown == [1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 30]
    assert caplog.records[1].message == (
        "step 4/30  loss 0.5123  accuracy 0.812  margin 1.500  12.3 pairs/s  1:44 left"  # 26 steps of 4 s
    )


def test_lines_follow_the_interval_when_steps_are_slow(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    progress = Console(LoggingConfig(log_interval=5), total_steps=12, stream=io.StringIO(), clock=clock)
    for step in range(1, 13):
        clock.now += 60.0
        progress.update(step, METRICS)
    assert [record.message.split()[1] for record in caplog.records] == ["1/12", "5/12", "10/12", "12/12"]


def test_time_left_counts_from_the_resumed_step_and_forgets_old_steps() -> None:
    clock = Clock()
    progress = Console(LoggingConfig(), total_steps=1000, start_step=800, stream=io.StringIO(), clock=clock)
    assert progress.seconds_left() is None
    clock.now += 300.0
    progress.update(801, METRICS)
    assert progress.seconds_left() == pytest.approx(300.0 * 199)
    for step in range(802, 852):
        clock.now += 2.0
        progress.update(step, METRICS)
    assert progress.seconds_left() == pytest.approx(2.0 * (1000 - 851))


def test_bar_in_a_terminal_shows_the_values() -> None:
    clock = Clock()
    terminal = Terminal()
    with closing(Console(LoggingConfig(), total_steps=4, start_step=2, stream=terminal, clock=clock)) as progress:
        for step in (3, 4):
            clock.now += 1.0
            progress.update(step, METRICS)
    last = terminal.getvalue().replace("\n", "\r").rstrip("\r ").split("\r")[-1]
    assert "100%" in last
    assert "4/4" in last
    assert "loss 0.5123  accuracy 0.812  margin 1.500  12.3 pairs/s  0:00 left" in last


def test_no_bar_when_it_is_turned_off(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    terminal = Terminal()
    with closing(Console(LoggingConfig(progress_bar=False), total_steps=4, stream=terminal)) as progress:
        progress.update(1, METRICS)
    assert terminal.getvalue() == ""
    assert "step 1/4" in caplog.text


def test_validation_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with closing(Console(LoggingConfig(), total_steps=4, stream=io.StringIO())) as progress:
        progress.validation(2, {"loss": 1.0, "rewards/accuracies": 0.75})
    assert caplog.records[0].message == "validation at step 2/4  loss 1.0000  accuracy 0.750"


def test_messages_beside_the_bar_are_printed_once() -> None:
    terminal = Terminal()
    handler = logging.StreamHandler(sys.stderr)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        with redirect_stderr(io.StringIO()) as errors:
            handler.setStream(sys.stderr)
            with closing(Console(LoggingConfig(), total_steps=4, stream=terminal)) as progress:
                progress.validation(2, {"loss": 1.0})
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    shown = errors.getvalue() + terminal.getvalue()
    assert shown.count("validation at step 2/4") == 1
    assert handler not in root.handlers
    assert logging.getLogger("nemo_lmpo").handlers == []
