"""Small pieces of stable arithmetic that several losses share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nemo_lmpo.errors import ConfigError
from nemo_lmpo.loss.interface import LossInputs


def upcast(values: Tensor) -> Tensor:
    """At least float32: half precision and integers are raised, float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def sums(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """``S_w`` and ``S_l``: summed log-probabilities of chosen and rejected, ``[B]``."""
    return upcast(inputs.chosen_logps), upcast(inputs.rejected_logps)


def averages(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """``S_w / n_w`` and ``S_l / n_l``: mean log-probability per token of chosen and rejected, ``[B]``."""
    chosen, rejected = sums(inputs)
    return chosen / inputs.chosen_lengths, rejected / inputs.rejected_lengths


def log_ratios(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """``S_w - S_ref_w`` and ``S_l - S_ref_l``: log-ratios of policy and frozen reference, ``[B]``.

    Raises:
        ConfigError: The inputs carry no reference log-probabilities.
    """
    if inputs.reference_chosen_logps is None or inputs.reference_rejected_logps is None:
        raise ConfigError(
            "reference_chosen_logps/reference_rejected_logps are None: this loss compares with a reference model; "
            "give its log-probabilities or choose a loss.name without one (lmpo, simpo, cpo, orpo, slic, sft)."
        )
    chosen, rejected = sums(inputs)
    return (
        chosen - upcast(inputs.reference_chosen_logps).detach(),
        rejected - upcast(inputs.reference_rejected_logps).detach(),
    )


def log1mexp(values: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for ``x < 0`` without cancellation at either end (Maechler's split at ``-ln 2``).

    Above the split, where ``exp(x)`` is near 1, ``-expm1(x)`` keeps the digits; below it ``log1p`` does.
    """
    return torch.where(values > -math.log(2), torch.log(-torch.expm1(values)), torch.log1p(-torch.exp(values)))
