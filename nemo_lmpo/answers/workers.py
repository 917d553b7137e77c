"""Work on many items by several threads: one bad item blocks no other, and Ctrl-C waits for none."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from nemo_lmpo.answers.http import Stopped
from nemo_lmpo.errors import UserError
from nemo_lmpo.runtime.threads import Thread

MAX_IN_A_ROW = 5
"""Items that may fail one after the other before the rest is left alone."""
KEPT = "what is answered so far is kept, and the same command resumes"
_LOOK_SECONDS = 0.2
Item = TypeVar("Item")


class ItemError(UserError):
    """One item cannot be done; others can."""


class Failures:
    """What went wrong with some of many items, and whether to go on.

    Args:
        total: items in all.
    """

    def __init__(self, total: int) -> None:
        self.stop = threading.Event()
        """Set when nothing more is to be begun, nor tried again."""
        self._total = total
        self._lock = threading.Lock()
        self._items: list[ItemError] = []
        self._in_a_row, self._succeeded = 0, 0
        self._end: BaseException | None = None

    @property
    def any_success(self) -> bool:
        """Whether an item was done."""
        return self._succeeded > 0

    def success(self) -> None:
        """An item is done."""
        with self._lock:
            self._succeeded += 1
            self._in_a_row = 0

    def add(self, error: BaseException) -> None:
        """An item failed; anything but an :class:`ItemError` ends the work, and so do too many in a row."""
        with self._lock:
            if isinstance(error, ItemError):
                self._items.append(error)
                self._in_a_row += 1
                if self._in_a_row < MAX_IN_A_ROW:
                    return
            elif self._end is None and not isinstance(error, Stopped):
                self._end = error
            self.stop.set()

    def raise_first(self) -> None:
        """Raise what ended the work, or one error for the items that failed.

        Raises:
            UserError: with the first failure's sentence, and how many there are.
            BaseException: of a bug, as it was raised.
        """
        if isinstance(self._end, UserError):
            raise UserError(f"{self._end}; {KEPT}") from None
        if self._end is not None:
            raise self._end
        if self._items:
            rest = "stopped after" if self.stop.is_set() else "failed:"
            raise UserError(
                f"{self._items[0]}; {rest} {len(self._items)} of {self._total} requests with no usable answer; {KEPT}"
            )


def for_each(items: Sequence[Item], work: Callable[[Item, threading.Event], object], concurrency: int) -> None:
    """Do the work on each item, several at a time.

    After an error that ends the work, items that are begun are finished, so that what was paid for is kept. An
    interruption leaves them behind in daemon threads, which end with the process.

    Args:
        items: to be worked on, in this order.
        work: takes an item, and an event that is set when it should not try again.
        concurrency: threads at most.

    Raises:
        UserError: as of :meth:`Failures.raise_first`.
    """
    failures = Failures(len(items))
    left: queue.SimpleQueue[Item] = queue.SimpleQueue()
    for each in items:
        left.put(each)

    def loop() -> None:
        while not failures.stop.is_set():
            try:
                item = left.get_nowait()
            except queue.Empty:
                return
            try:
                work(item, failures.stop)
                failures.success()
            except BaseException as error:
                failures.add(error)

    threads = [Thread(loop, name="worker") for _ in range(min(concurrency, len(items)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(_LOOK_SECONDS)  # with a timeout, so that a signal is noticed
    except BaseException:
        failures.stop.set()
        raise
    failures.raise_first()
