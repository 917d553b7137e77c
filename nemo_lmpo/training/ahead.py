"""Builds the batch that comes next, and copies it to the device, while the current one is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_lmpo.runtime.threads import thread_pool
from nemo_lmpo.training.batches import BatchBuilder, Examples, StepBatch


@dataclass
class BatchesAhead:
    """The batches of a run of steps, each asked for in turn and ready when it is."""

    builder: BatchBuilder
    """Makes the batches, on its device."""
    pairs: Examples
    """What they are made of; only the thread reads it as long as there is a batch to come."""
    indices_of: Callable[[int], np.ndarray]
    """The pairs of batch ``number``."""
    num_batches: int

    def __post_init__(self) -> None:
        self._thread = thread_pool(1, "next-batch")
        self._coming: tuple[int, Future[StepBatch]] | None = None
        self._stream = torch.cuda.Stream(self.builder.device) if self.builder.device.type == "cuda" else None

    def get(self, number: int) -> StepBatch:
        """Batch ``number``, on the device; the one after it is begun.

        Raises:
            DataError: a pair does not fit, whatever else the builder says.
        """
        coming = self._coming if self._coming is not None and self._coming[0] == number else self._begin(number)
        self._coming = None
        batch = coming[1].result()
        if self._stream is not None:
            _take_over(batch, self._stream)
        if number + 1 < self.num_batches:
            self._coming = self._begin(number + 1)
        return batch

    def wait(self) -> None:
        """Until the thread has nothing to do, for whoever forks the process."""
        if self._coming is not None:
            self._coming[1].exception()

    def close(self) -> None:
        """End the thread; a batch that is under way is thrown away."""
        self._coming = None
        self._thread.shutdown()

    def _begin(self, number: int) -> tuple[int, Future[StepBatch]]:
        return number, self._thread.submit(self._build, self.indices_of(number))

    def _build(self, indices: np.ndarray) -> StepBatch:
        with _on_stream(self._stream):
            return self.builder.build(self.pairs, indices)


def _on_stream(stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _take_over(batch: StepBatch, stream: torch.cuda.Stream) -> None:
    """Let the computation wait for the copies, on the device, and keep their memory until it is done with them."""
    current = torch.cuda.current_stream()
    current.wait_stream(stream)

    def keep(tensor: Tensor) -> Tensor:
        tensor.record_stream(current)
        return tensor

    for micro_batch in batch.all_micro_batches:
        micro_batch.map(keep)
