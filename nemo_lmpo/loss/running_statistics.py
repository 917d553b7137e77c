"""Running statistics of per-pair values, as the losses ask for them (Eq. 9, 20-22).

No communication happens here: the caller gathers the values of all data-parallel ranks and hands every rank the
same ones, so the state is the same everywhere. All arithmetic is float64 on Python floats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.loss.interface import Statistics, StatisticsConfig

KINDS = ("ema", "cumulative", "batch_mean")
UPDATES = ("after_step", "before_step")


class RunningStatistics:
    """Mean and standard deviation over time.

    ``ema``::

        mean <- g mean + (1 - g) mean(values)      Eq. 21, from 0
        std  <- g std  + (1 - g) std(values)       Eq. 22, from 0; std over n - 1

    With bias correction both are divided by the weight they have gathered, ``1 - g^k`` after ``k`` updates, as
    Adam's moments are. A batch of one value has no standard deviation: it updates the mean and leaves ``std`` as it
    is, so each of the two counts its own updates. Without bias correction (the released code, from zero) the same
    holds; there the authors' trainer would turn to NaN for good.

    ``cumulative``: mean and standard deviation (n - 1) over all values seen, merged batch by batch (Chan et al.).

    ``batch_mean``: the mean of the last update only.

    :meth:`current` reports ``count`` 0 while no standard deviation is known (for ``batch_mean``: no mean).
    """

    def __init__(self, config: StatisticsConfig) -> None:
        if config.kind not in KINDS:
            raise ValueError(f"statistics.kind={config.kind!r}: choose one of {', '.join(KINDS)}.")
        if config.update not in UPDATES:
            raise ValueError(f"statistics.update={config.update!r}: choose one of {', '.join(UPDATES)}.")
        self.config = config
        self._mean = 0.0
        self._mean_count = 0
        # `ema`: the moving standard deviation and its updates; `cumulative`: sum of squared deviations and, from
        # two values on, their number.
        self._spread = 0.0
        self._spread_count = 0

    def update(self, values: Tensor) -> None:
        """Take in all values of one global batch, or of one group of its pairs.

        Args:
            values: Any shape and floating type, treated as one list; an empty one changes nothing.
        """
        if values.numel() == 0:
            return
        values = values.detach().to(device="cpu", dtype=torch.float64).flatten()
        if self.config.kind == "ema":
            self._update_ema(values)
        elif self.config.kind == "cumulative":
            self._update_cumulative(values)
        else:
            self._mean = values.mean().item()
            self._mean_count = values.numel()

    def update_in_groups(self, values: Tensor, *, evaluation: bool = False) -> Statistics:
        """Take in a global batch before its losses, group by group.

        Args:
            values: ``[B]`` in the order of the global batch; the last group may be smaller than the others.
            evaluation: Whether groups have the size for evaluation.

        Returns:
            For each pair the statistics after its own group's update: ``[B]`` tensors on the CPU, ``mean`` and
            ``std`` in float64.
        """
        size = self.config.evaluation_group_size if evaluation else self.config.group_size
        known: list[Statistics] = []
        for group in values.split(size or max(values.numel(), 1)):
            self.update(group)
            known += [self.current()] * group.numel()
        return Statistics(
            mean=torch.tensor([one.mean for one in known], dtype=torch.float64),
            std=torch.tensor([one.std for one in known], dtype=torch.float64),
            count=torch.tensor([one.count for one in known], dtype=torch.int64),
        )

    def _update_ema(self, values: Tensor) -> None:
        momentum = self.config.momentum
        self._mean = momentum * self._mean + (1 - momentum) * values.mean().item()
        self._mean_count += 1
        if values.numel() > 1:
            self._spread = momentum * self._spread + (1 - momentum) * values.std(correction=1).item()
            self._spread_count += 1

    def _update_cumulative(self, values: Tensor) -> None:
        count, mean = values.numel(), values.mean().item()
        squares = (values - mean).square().sum().item()
        total = self._mean_count + count
        shift = mean - self._mean
        self._spread += squares + shift * shift * self._mean_count * count / total
        self._mean += shift * count / total
        self._mean_count = total
        self._spread_count = total if total > 1 else 0

    def current(self) -> Statistics:
        """What the next loss uses."""
        kind, eps = self.config.kind, self.config.eps
        if kind == "batch_mean":
            return Statistics(mean=self._mean, std=1.0, count=self._mean_count)
        if kind == "cumulative":
            std = math.sqrt(self._spread / (self._spread_count - 1)) if self._spread_count else 1.0
            return Statistics(mean=self._mean, std=max(std, eps), count=self._spread_count)
        mean = self._corrected(self._mean, self._mean_count)
        std = self._corrected(self._spread, self._spread_count) if self._spread_count else 1.0
        return Statistics(mean=mean, std=max(std, eps), count=self._spread_count)

    def _corrected(self, average: float, count: int) -> float:
        if not self.config.bias_correction or count == 0:
            return average
        return average / (1 - self.config.momentum**count)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers, for a checkpoint."""
        return {
            "kind": self.config.kind,
            "mean": self._mean,
            "mean_count": self._mean_count,
            "spread": self._spread,
            "spread_count": self._spread_count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            CheckpointError: The state is of another kind, incomplete, or not made of numbers.
        """
        kind = state.get("kind")
        if kind != self.config.kind:
            raise CheckpointError(
                f"The checkpoint holds margin statistics of kind {kind!r}, the configuration asks for "
                f"{self.config.kind!r}: set loss.statistics as the run had it, or start a new run."
            )
        try:
            mean, spread = float(state["mean"]), float(state["spread"])
            mean_count, spread_count = int(state["mean_count"]), int(state["spread_count"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"The checkpoint's margin statistics are damaged: {dict(state)!r}.") from error
        self._mean, self._spread = mean, spread
        self._mean_count, self._spread_count = mean_count, spread_count
