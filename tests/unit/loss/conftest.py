from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from nemo_lmpo.loss.interface import LossInputs, Statistics

MakeInputs = Callable[..., LossInputs]


@pytest.fixture
def make_inputs() -> MakeInputs:
    """Loss inputs from plain numbers; sums `s`, lengths `n`, reference sums `ref`, of chosen and rejected.

    `shared` are the sums over the common length: chosen, rejected, and both of the reference.
    """

    def make(
        s_w: Sequence[float],
        s_l: Sequence[float],
        n_w: Sequence[float],
        n_l: Sequence[float],
        ref_w: Sequence[float] | None = None,
        ref_l: Sequence[float] | None = None,
        statistics: Statistics | None = None,
        shared: Sequence[Sequence[float]] = (),
        dtype: torch.dtype = torch.float64,
    ) -> LossInputs:
        tensors = [torch.tensor(list(values), dtype=dtype) for values in (s_w, s_l, n_w, n_l)]
        for tensor in tensors[:2]:
            tensor.requires_grad_()
        reference = [None if values is None else torch.tensor(list(values), dtype=dtype) for values in (ref_w, ref_l)]
        parts = [torch.tensor(list(values), dtype=dtype) for values in shared]
        for tensor in parts[:2]:
            tensor.requires_grad_()
        columns: Any = (*tensors, *reference, *parts)
        mean_length = sum(n_w) / len(n_w)
        known: dict[str, Any] = {"mean_chosen_length": mean_length, "statistics": statistics or Statistics()}
        return LossInputs(*columns, **known)

    return make
