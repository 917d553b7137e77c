"""When to stop before the last step: signals from the scheduler, and the time limit."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_CTRL_C = b"\nthe step is finished and saved before the run stops; Ctrl-C again ends it at once, without saving\n"
_TERMINAL = 2


class StopCondition:
    """Collects reasons to stop and lets all ranks agree on them.

    A signal sets a flag only: the step in progress is finished and saved first; a second Ctrl-C ends the process at
    once. The time limit stops early enough for one more step and a save of the length of the longest seen, and a
    validation where one is next. Time is that of a clock which nobody sets.
    """

    def __init__(self, max_seconds: float | None, *, started: float, stop_at: float | None = None) -> None:
        """Set the limits.

        Args:
            max_seconds: time from ``started`` on; None: no limit.
            started: unix time.
            stop_at: unix time at which a batch job wants everything saved; None: no such time.
        """
        own_end = None if max_seconds is None else started + max_seconds
        end = min((end for end in (own_end, stop_at) if end is not None), default=None)
        self._ends_at = None if end is None else time.monotonic() + end - time.time()
        self.longest_step = 0.0
        self.longest_validation = 0.0
        self.longest_save = 0.0
        self._signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}
        self._process = os.getpid()

    def __enter__(self) -> StopCondition:
        for number in STOP_SIGNALS:
            # Whoever starts a run with nohup, or in the background of a script, wants these two ignored.
            wanted = number not in (signal.SIGHUP, signal.SIGINT) or signal.getsignal(number) != signal.SIG_IGN
            if wanted:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *args: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked checkpoint writer: it ends with this process
            return
        self._signal = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            with suppress(OSError):  # the terminal may be gone
                os.write(_TERMINAL, _CTRL_C)

    def _own_reason(self, validates: bool) -> int:
        """0: none, 1: time limit, else the signal's number plus 1."""
        if self._signal is not None:
            return int(self._signal) + 1
        if self._ends_at is not None:
            needed = self.longest_step + self.longest_save + (self.longest_validation if validates else 0.0)
            if time.monotonic() + needed >= self._ends_at:
                return 1
        return 0

    def reason(self, device: torch.device, *, validates: bool = False) -> str | None:
        """Why to stop now, the same on all ranks, or None; one all-reduce of a number over all ranks.

        ``validates`` tells whether a validation follows the next step.
        """
        code = torch.tensor([self._own_reason(validates)], dtype=torch.int64, device=device)
        if dist.get_world_size() > 1:
            dist.all_reduce(code, op=dist.ReduceOp.MAX)
        value = int(code.item())
        if value == 0:
            return None
        return "time limit" if value == 1 else signal.Signals(value - 1).name
