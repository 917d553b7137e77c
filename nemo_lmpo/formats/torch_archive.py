"""torch's archives, in which checkpoints keep each tensor and object, written into something else than a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, Any, cast

_BLOCK = 2**20
"""Bytes that are given on at a time: they are in the processor's cache when they are summed and then written."""


def save_into(take: Callable[[memoryview], object], value: object) -> None:
    """What `torch.save` makes of a value, block by block.

    Raises:
        OSError: of ``take``; torch would tell only that a position was unexpected.
    """
    import torch

    stream = _Stream(take)
    try:
        torch.save(value, cast(IO[bytes], stream))
    except (OSError, RuntimeError) as error:
        raise stream.failure or error from None


class _Stream:
    """What torch writes an archive to."""

    def __init__(self, take: Callable[[memoryview], object]) -> None:
        self._take = take
        self.failure: OSError | None = None

    def write(self, content: Any) -> int:
        """Give on all of it."""
        view = memoryview(content).cast("B")
        try:
            for start in range(0, len(view), _BLOCK):
                self._take(view[start : start + _BLOCK])
        except OSError as error:
            self.failure = error
            raise
        return len(view)

    def flush(self) -> None:
        """Nothing is kept."""
