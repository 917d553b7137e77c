"""Signals as one exception, and a second one that is not argued with."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from nemo_lmpo.runtime.interruption import Interrupted, raising_when_interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def from_a_terminal() -> Iterator[None]:
    """Handlers as of a program that was started from a terminal."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_raised_once_and_the_next_one_ends_the_process(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    after: list[Any] = []

    def work() -> None:
        with raising_when_interrupted():
            try:
                os.kill(os.getpid(), number)
            finally:
                after.extend(signal.getsignal(each) for each in SIGNALS)

    with pytest.raises(Interrupted) as caught:
        work()
    assert after == [signal.SIG_DFL] * 3
    assert isinstance(caught.value, KeyboardInterrupt)
    assert caught.value.status == 128 + number
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_what_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with raising_when_interrupted():
        os.kill(os.getpid(), signal.SIGHUP)  # as after nohup
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)


def test_other_threads_change_nothing() -> None:
    found = []

    def look() -> None:
        with raising_when_interrupted():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]
