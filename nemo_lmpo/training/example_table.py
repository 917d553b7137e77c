"""Values of each example of a global batch, collected from all ranks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_lmpo.parallel.groups import ParallelGroups


class ExampleTable:
    """``[examples, columns]`` float64, a row for each example of the global batch in its order."""

    of_each_source: ClassVar[tuple[str, ...]] = ()
    """Metrics that validation tells of every source of a mixture, too."""

    def __init__(self, columns: Sequence[str], num_examples: int, device: torch.device) -> None:
        self.columns = tuple(columns)
        self.values = torch.zeros(num_examples, len(self.columns), dtype=torch.float64, device=device)

    def _with(self, values: Tensor) -> Self:
        other = copy.copy(self)
        other.values = values
        return other

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The examples of several batches, one behind the other."""
        return parts[0]._with(torch.cat([part.values for part in parts]))

    def put(self, example_index: Tensor, values: Mapping[str, Tensor]) -> None:
        """Fill the rows of ``example_index`` ``[B]``; ``values`` has a ``[B]`` tensor for every column."""
        columns = [values[name].detach().to(torch.float64) for name in self.columns]
        self.values[example_index] = torch.stack(columns, dim=1)

    def column(self, name: str) -> Tensor:
        """``[examples]`` float64."""
        return self.values[:, self.columns.index(name)]

    def share(self, groups: ParallelGroups) -> None:
        """Give every rank all rows.

        Communicates: an all-reduce over the data-parallel group of the last stage, then a broadcast over the
        pipeline group. Each example was computed by exactly one data-parallel rank, so adding is collecting.
        """
        if groups.is_last_stage and groups.data.size() > 1:
            dist.all_reduce(self.values, group=groups.data)
        if groups.pipeline.size() > 1:
            dist.broadcast(self.values, groups.last_stage_rank, group=groups.pipeline)

    def read(self) -> Self:
        """Bring the values to the host, in one copy, for everything that is asked of them from here on."""
        self.values = self.values.cpu()
        return self

    def by_source(self, sources: np.ndarray, names: Sequence[str]) -> dict[str, float]:
        """The metrics that differ by source, as `SOURCE/rewards/accuracies`; of sources that have examples here.

        Args:
            sources: for each example the number of its source, ``[examples]``.
            names: what the sources are called; of a single one nothing is told.
        """
        found: dict[str, float] = {}
        for number, name in enumerate(names if len(names) > 1 else ()):
            rows = torch.from_numpy(np.flatnonzero(sources == number)).to(self.values.device)
            part = self._with(self.values[rows])
            if len(part.values):
                metrics = part.metrics()
                found |= {f"{name}/{metric}": metrics[metric] for metric in self.of_each_source if metric in metrics}
        return found

    def not_finite(self) -> list[int]:
        """Positions in the global batch whose loss is infinite or not a number."""
        return torch.nonzero(~torch.isfinite(self.column("loss"))).flatten().tolist()

    def metrics(self) -> dict[str, float]:
        """What the table says of its examples together, by the metrics' names."""
        return {name: float(self.column(name).mean()) for name in self.columns}
