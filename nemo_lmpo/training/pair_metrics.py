"""The metrics of preference pairs."""

from __future__ import annotations

import math

import torch

from nemo_lmpo.loss.interface import LossInputs
from nemo_lmpo.loss.registry import PreferenceLoss
from nemo_lmpo.training.example_table import ExampleTable

BASE_COLUMNS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen_sum",
    "logps/rejected_sum",
    "lengths/chosen",
    "lengths/rejected",
)
CHOSEN_SHARED, REJECTED_SHARED = "logps/chosen_shared_sum", "logps/rejected_shared_sum"
STATISTIC = "statistic"
"""What feeds the running statistics."""
OF_EACH_SOURCE = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "lengths/chosen",
    "lengths/rejected",
)
"""Metrics that validation tells of every source of a mixture, too: how long answers are differs by source."""
NO_METRICS = (CHOSEN_SHARED, REJECTED_SHARED, STATISTIC)
"""Columns that are not metrics of their own."""


def pair_columns(loss: PreferenceLoss, *, shared_logps: bool = False) -> tuple[str, ...]:
    """The values that a loss gives for each pair; asked of the loss itself, on one made-up pair.

    Every pipeline stage must know them, and only the last one computes losses.
    """
    probe = torch.full((1,), -1.0)
    reference = probe if loss.needs_reference else None
    inputs = LossInputs(*(probe, probe * 2, -probe, -probe), *(reference,) * 2, *(probe,) * 4, mean_chosen_length=1.0)
    shared = (CHOSEN_SHARED, REJECTED_SHARED) if shared_logps else ()
    observed = (STATISTIC,) if loss.observe(inputs) is not None else ()
    return (*BASE_COLUMNS, *shared, *loss(inputs).metrics, *observed)


class PairMetrics(ExampleTable):
    """The values of each preference pair, and the metrics made of them."""

    of_each_source = OF_EACH_SOURCE

    def metrics(self) -> dict[str, float]:
        """Means over the pairs, under the field's names; ``logps/*`` are means of per-token means, in nats."""
        column = {name: self.column(name) for name in self.columns}
        chosen, rejected = column["rewards/chosen"], column["rewards/rejected"]
        per_pair = {
            **{name: column[name] for name in self.columns if name not in NO_METRICS},
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).double(),
            "logps/chosen": column["logps/chosen_sum"] / column["lengths/chosen"],
            "logps/rejected": column["logps/rejected_sum"] / column["lengths/rejected"],
        }
        return {name: float(value.mean()) if len(value) else math.nan for name, value in per_pair.items()}
