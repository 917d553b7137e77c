"""What saving costs a run: seconds, speed and share, as metrics, for the console and for the report."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch.distributed as dist

from nemo_lmpo.checkpoint.manager import CheckpointManager, SaveCost
from nemo_lmpo.runtime.files import format_bytes

_logger = logging.getLogger(__name__)


class SavingCosts:
    """Adds up the cost of a process's checkpoints, from its first step on."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._held_up = 0.0
        self._told = 0.0
        """Of the seconds held up, those that a line of metrics has."""
        self._newest: SaveCost | None = None
        """The newest checkpoint that no line of metrics has."""
        self._all: list[SaveCost] = []

    def begin(self) -> None:
        """Training begins: its time is what shares are of."""
        self._began = time.monotonic()

    @property
    def share(self) -> float:
        """Of the time since training began, what it waited for saving."""
        return self._held_up / max(time.monotonic() - self._began, 1e-9)

    def count(self, checkpoints: CheckpointManager) -> float:
        """Take over what saving took since the last call; seconds of the longest save among it."""
        waited, self._held_up = checkpoints.held_up - self._held_up, checkpoints.held_up
        costs, checkpoints.costs = checkpoints.costs, []
        for cost in costs:
            self._newest = cost
            self._all.append(cost)
            if dist.get_rank() == 0:
                _logger.info("%s", self._told_of(cost))
        return max([waited, *(cost.seconds for cost in costs)])

    def _told_of(self, cost: SaveCost) -> str:
        return (
            f"checkpoint of step {cost.step}: {format_bytes(cost.num_bytes)} in {cost.writing:.2f} s "
            f"({_rate(cost):.2f} GB/s); training waited {cost.held_up:.2f} s, and for saving "
            f"{100 * self.share:.1f} % of its time so far"
        )

    def take_metrics(self) -> dict[str, float]:
        """Of the saves since the last line of metrics; nothing where there was none."""
        waited, cost = self._held_up - self._told, self._newest
        if not waited and cost is None:
            return {}
        self._told, self._newest = self._held_up, None
        metrics = {"checkpoint/seconds": waited, "checkpoint/share": self.share}
        if cost is not None:
            metrics |= {"checkpoint/write_seconds": cost.writing, "checkpoint/gb_per_second": _rate(cost)}
        return metrics

    def facts(self) -> dict[str, Any]:
        """Of all saves, the last one included."""
        num_bytes = sum(cost.num_bytes for cost in self._all)
        writing = sum(cost.writing for cost in self._all)
        return {
            "checkpoints": len(self._all),
            "seconds": round(self._held_up, 3),
            "share": round(self.share, 4),
            "bytes": num_bytes,
            "write_seconds": round(writing, 3),
        }


def _rate(cost: SaveCost) -> float:
    """10^9 bytes a second of all ranks together."""
    return cost.num_bytes / 1e9 / max(cost.writing, 1e-9)
