"""The boundary to everything that only watches a run: it can neither end training nor hold it up.

A tracker works on a thread of its own, which takes one call after the other. Training hands over a call and continues;
it waits only at the start, where a tracker that cannot start is still an error of the configuration, and at the end,
for a limited time. What a tracker raises, and that it does not answer, becomes one warning per tracker.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TypeVar

from nemo_lmpo.errors import first_line, shown
from nemo_lmpo.runtime.threads import Thread

START_SECONDS = 180.0
"""How long a tracker may take to start; W&B's own limit is 90, MLflow's as :mod:`.trackers` sets it 100."""
CALL_SECONDS = 60.0
"""How long a call may take before the user hears of it."""
CLOSE_SECONDS = 30.0
"""How long all trackers together may take to finish; a batch job keeps 60 seconds free before its end."""
MOST_WAITING = 1000
"""Calls that wait for a tracker; of more, the oldest are dropped."""

WHATEVER = (Exception, SystemExit)
"""What a tracker may raise: by intention all, as this is the boundary that keeps it from training."""

_FAILED: set[str] = set()
"""Trackers of this process that did not do all that they were asked."""

_logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")


def reason(error: BaseException) -> str:
    """What a tracker raised, in one printable line."""
    return f"{type(error).__name__}: {shown(first_line(error), 200)}"


def any_failed() -> bool:
    """Whether a tracker failed or hangs: what it registered for the end of the process would fail or hang, too."""
    return bool(_FAILED)


class Harmless:
    """A block that only shows something: whatever it raises is one warning, however often it is entered."""

    def __init__(self, what: str, *, instead: str) -> None:
        """Say what it is.

        Args:
            what: the block, as `the report`.
            instead: what the user has without it, or can do about it.
        """
        self.what = what
        self.instead = instead
        self.failed = False

    def __enter__(self) -> Harmless:
        return self

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> bool:
        if not isinstance(error, WHATEVER):  # Ctrl-C passes
            return False
        if not self.failed:
            _logger.warning("%s failed (%s); training continues: %s", self.what, reason(error), self.instead)
        self.failed = True
        return True


class Observer:
    """A thread that makes calls to one tracker."""

    def __init__(self, name: str) -> None:
        """Start the thread.

        Args:
            name: the tracker's, for the warning.
        """
        self.name = name
        self._calls: deque[Callable[[], object] | None] = deque()
        self._changed = threading.Condition()
        self._busy_since: float | None = None
        self._warned = False
        # A daemon: a tracker that never answers must not keep the process from ending.
        self._thread = Thread(self._work, name=f"observer-{name}")
        self._thread.start()

    def ask(self, call: Callable[[], _Result], *, seconds: float) -> _Result:
        """Make a call and wait for what it returns.

        Raises:
            TimeoutError: it took longer than ``seconds``.
            Exception: whatever the call raises.
        """
        answer: Future[_Result] = Future()

        def make() -> None:
            try:
                answer.set_result(call())
            except WHATEVER as error:
                answer.set_exception(error)

        self._add(make)
        try:
            return answer.result(seconds)
        except FutureTimeoutError:
            if answer.done():  # the call's own
                raise
            raise TimeoutError(f"no answer within {seconds:g} seconds") from None

    def tell(self, call: Callable[[], object]) -> None:
        """Hand over a call; returns at once, and never raises."""
        with self._changed:
            busy, full = self._busy_since, len(self._calls) >= MOST_WAITING
            if full:
                self._calls.popleft()
        if full:
            self._warn(f"{MOST_WAITING} calls wait for it")
        elif busy is not None and time.monotonic() - busy > CALL_SECONDS:
            self._warn(f"no answer for {CALL_SECONDS:g} seconds")
        self._add(call)

    def finish(self, call: Callable[[], object]) -> None:
        """Hand over the last call, after which the thread ends."""
        self._add(call)
        self._add(None)

    def wait(self, until: float) -> None:
        """Wait for the thread's end, at most until the monotonic time ``until``."""
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._warn("it did not take the last values in time")

    def fail(self, why: str) -> None:
        """Warn that the tracker cannot be used, and end the thread."""
        self._warn(why)
        self._add(None)

    def _add(self, call: Callable[[], object] | None) -> None:
        with self._changed:
            self._calls.append(call)
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy_since = None
                self._changed.wait_for(lambda: self._calls)
                call = self._calls.popleft()
                self._busy_since = time.monotonic()
            if call is None:
                return
            try:
                call()
            except WHATEVER as error:
                self._warn(reason(error))

    def _warn(self, why: str) -> None:
        with self._changed:
            warned, self._warned = self._warned, True
        _FAILED.add(self.name)
        if not warned:
            _logger.warning(
                "%s does not take all values (%s); training continues, and metrics.jsonl has them all", self.name, why
            )
