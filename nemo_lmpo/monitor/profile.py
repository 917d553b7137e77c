"""Profiles chosen steps: a trace for chrome://tracing or Perfetto, on GPUs with NVTX ranges and a memory snapshot."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from nemo_lmpo.monitor.observer import Harmless

_logger = logging.getLogger(__name__)

MOST_MEMORY_EVENTS = 200_000


class StepProfiler:
    """Records the steps from a first to a last one, each under its number."""

    def __init__(self, steps: list[int] | None, directory: Path, *, rank: int) -> None:
        """Record nothing yet.

        Args:
            steps: first and last step, counted from 1; None: none.
            directory: where the files go; made when there is one.
            rank: this process's, for the names of its files.
        """
        self.first, self.last = steps or (0, -1)
        self.directory = directory
        self.rank = rank
        self._profile: profile | None = None
        self._recording = Harmless("the profile", instead="free the disk, or leave trainer.profile unset")

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step ``number``; what goes wrong with recording is a warning."""
        if not self.first <= number <= self.last or self._recording.failed:
            yield
            return
        with self._recording:
            if self._profile is None:
                self._start()
        with self._range(number):
            yield
        if number == self.last:
            self.close()

    @contextmanager
    def _range(self, number: int) -> Iterator[None]:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.nvtx.range_push(f"step {number}")
        try:
            with record_function(f"step {number}"):
                yield
        finally:
            if on_gpu:
                torch.cuda.nvtx.range_pop()

    def close(self) -> None:
        """Write what was recorded, if anything was."""
        recorded, self._profile = self._profile, None
        if recorded is not None:
            with self._recording:
                self._write(recorded)

    def _write(self, recorded: profile) -> None:
        recorded.__exit__(None, None, None)
        self.directory.mkdir(parents=True, exist_ok=True)
        name = f"steps_{self.first}-{self.last}_rank_{self.rank}"
        trace = self.directory / f"{name}.json.gz"
        recorded.export_chrome_trace(str(trace))
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(self.directory / f"{name}_memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        _logger.info("profile of steps %d to %d: %s", self.first, self.last, trace)

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MOST_MEMORY_EVENTS)
        self._profile = profile(activities=activities, record_shapes=True, with_stack=True)
        self._profile.__enter__()
