"""The metrics of single answers with a label, under the names that pairs have: good answers are the chosen ones."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_lmpo.loss.interface import ResponseInputs
from nemo_lmpo.loss.registry import PreferenceLoss
from nemo_lmpo.training.example_table import ExampleTable
from nemo_lmpo.training.pair_metrics import OF_EACH_SOURCE, STATISTIC
from nemo_lmpo.training.response_metrics import LENGTH, LOGPS

DESIRABLE, REWARD = "answers/desirable", "reward"
_NO_METRICS = (LOGPS, LENGTH, REWARD, STATISTIC)
"""Columns that are not metrics of their own."""


def answer_columns(loss: PreferenceLoss) -> tuple[str, ...]:
    """The values that a loss gives for each answer; asked of the loss itself, on one made-up answer."""
    probe = torch.full((1,), -1.0)
    inputs = ResponseInputs(probe, -probe, 1.0, probe if loss.needs_reference else None, probe < 0)
    outputs = loss.of_responses(inputs)
    rewards = () if outputs.rewards is None else (REWARD,)
    observed = () if loss.observe_responses(inputs) is None else (STATISTIC,)
    return ("loss", LOGPS, LENGTH, DESIRABLE, *rewards, *outputs.metrics, *observed)


class AnswerMetrics(ExampleTable):
    """The values of each answer, and the metrics made of them."""

    of_each_source = OF_EACH_SOURCE

    def metrics(self) -> dict[str, float]:
        """Means over the answers; `*/chosen` over the desirable ones, `*/rejected` over the undesirable ones.

        What is a mean over no answer is left out, and so is the difference to it.
        """
        desirable = self.column(DESIRABLE) > 0
        found = {name: float(self.column(name).mean()) for name in self.columns if name not in _NO_METRICS}
        for side, which in (("chosen", desirable), ("rejected", ~desirable)):
            if which.any():
                found |= {f"{name}/{side}{behind}": value for (name, behind), value in self._of(which).items()}
        if {"rewards/chosen", "rewards/rejected"} <= found.keys():
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found

    def _of(self, which: Tensor) -> dict[tuple[str, str], float]:
        """Means over the answers ``which``, by what stands in front of the side's name and behind it."""
        sums, lengths = self.column(LOGPS)[which], self.column(LENGTH)[which]
        values = {("logps", ""): sums / lengths, ("logps", "_sum"): sums, ("lengths", ""): lengths}
        if REWARD in self.columns:
            values["rewards", ""] = self.column(REWARD)[which]
        return {place: float(value.mean()) for place, value in values.items()}
