"""Per-pair values of a global batch, collected from all ranks, and the metrics made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_lmpo.loss.interface import LossInputs
from nemo_lmpo.loss.registry import PreferenceLoss
from nemo_lmpo.parallel.groups import ParallelGroups

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


class PairMetrics:
    """``[pairs, columns]`` float64, a row for each pair of the global batch in its order."""

    def __init__(self, columns: Sequence[str], num_pairs: int, device: torch.device) -> None:
        self.columns = tuple(columns)
        self.values = torch.zeros(num_pairs, len(self.columns), dtype=torch.float64, device=device)

    @classmethod
    def join(cls, parts: Sequence[PairMetrics]) -> PairMetrics:
        """The pairs of several batches, one behind the other."""
        joined = cls(parts[0].columns, 0, parts[0].values.device)
        joined.values = torch.cat([part.values for part in parts])
        return joined

    def put(self, pair_index: Tensor, values: Mapping[str, Tensor]) -> None:
        """Fill the rows of ``pair_index`` ``[B]``; ``values`` has a ``[B]`` tensor for every column."""
        columns = [values[name].detach().to(torch.float64) for name in self.columns]
        self.values[pair_index] = torch.stack(columns, dim=1)

    def column(self, name: str) -> Tensor:
        """``[pairs]`` float64."""
        return self.values[:, self.columns.index(name)]

    def share(self, groups: ParallelGroups) -> None:
        """Give every rank all rows.

        Communicates: an all-reduce over the data-parallel group of the last stage, then a broadcast over the
        pipeline group. Each pair was computed by exactly one data-parallel rank, so adding is collecting.
        """
        if groups.is_last_stage and groups.data.size() > 1:
            dist.all_reduce(self.values, group=groups.data)
        if groups.pipeline.size() > 1:
            dist.broadcast(self.values, groups.last_stage_rank, group=groups.pipeline)

    def read(self) -> PairMetrics:
        """Bring the values to the host, in one copy, for everything that is asked of them from here on."""
        self.values = self.values.cpu()
        return self

    def by_source(self, sources: np.ndarray, names: Sequence[str]) -> dict[str, float]:
        """The metrics that differ by source, as `SOURCE/rewards/accuracies`; of sources that have pairs here.

        Args:
            sources: for each pair the number of its source, ``[pairs]``.
            names: what the sources are called; of a single one nothing is told.
        """
        found: dict[str, float] = {}
        for number, name in enumerate(names if len(names) > 1 else ()):
            part = PairMetrics(self.columns, 0, self.values.device)
            part.values = self.values[torch.from_numpy(np.flatnonzero(sources == number)).to(self.values.device)]
            if len(part.values):
                metrics = part.metrics()
                found |= {f"{name}/{metric}": metrics[metric] for metric in OF_EACH_SOURCE}
        return found

    def not_finite(self) -> list[int]:
        """Positions in the global batch whose loss is infinite or not a number."""
        return torch.nonzero(~torch.isfinite(self.column("loss"))).flatten().tolist()

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
