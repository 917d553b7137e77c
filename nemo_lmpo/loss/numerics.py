"""Small pieces of stable arithmetic that several losses share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nemo_lmpo.errors import ConfigError
from nemo_lmpo.loss.interface import LossInputs, ResponseInputs


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
    return _ratio(inputs, "chosen"), _ratio(inputs, "rejected")


def shared_log_ratios(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """:func:`log_ratios` over the first ``min(n_w, n_l)`` tokens of both responses only, ``[B]``.

    Raises:
        ConfigError: The inputs carry no such sums, of the policy or of the reference.
    """
    return _ratio(inputs, "chosen_shared"), _ratio(inputs, "rejected_shared")


def response_log_ratios(inputs: ResponseInputs) -> Tensor:
    """``S - S_ref`` of single responses, ``[B]``.

    Raises:
        ConfigError: The inputs carry no reference log-probabilities.
    """
    return _difference(inputs.logps, inputs.reference_logps, "")


def _ratio(inputs: LossInputs, part: str) -> Tensor:
    return _difference(getattr(inputs, f"{part}_logps"), getattr(inputs, f"reference_{part}_logps"), f"{part}_")


def _difference(policy: Tensor | None, reference: Tensor | None, part: str) -> Tensor:
    if policy is None or reference is None:
        name = f"{part}logps" if policy is None else f"reference_{part}logps"
        what = "the policy's" if policy is None else "a reference model's"
        raise ConfigError(f"{name} is None: this loss needs {what} log-probabilities; hand them in.")
    return upcast(policy) - upcast(reference).detach()


def chosen_nll(inputs: LossInputs, reduction: str) -> Tensor:
    """:func:`nll` of the chosen response, ``[B]``."""
    return nll(inputs.chosen_logps, inputs.chosen_lengths, inputs.mean_chosen_length, reduction)


def nll(logps: Tensor, lengths: Tensor, mean_length: float | None, reduction: str) -> Tensor:
    """Negative log-likelihood of a response, ``[B]``, from its summed log-probability ``S`` and its length ``n``.

    - ``mean``: ``-S / n``; every response weighs the same in the batch mean, whatever its length.
    - ``token_mean``: ``-S / mean n``; the batch mean is the mean over all tokens of the global batch, so every token
      weighs the same.
    - ``sum``: ``-S``; every response weighs as much as it is long.

    Raises:
        ConfigError: ``token_mean`` without ``mean_length``, the mean of the global batch.
    """
    total = upcast(logps)
    if reduction == "mean":
        return -total / lengths
    if reduction == "sum":
        return -total
    if reduction == "token_mean":
        if mean_length is None:
            raise ConfigError("the mean length is None: nll=token_mean needs that of the global batch.")
        return -total / mean_length
    raise AssertionError(f"unvalidated nll {reduction!r}")


def log1mexp(values: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for ``x < 0`` without cancellation at either end (Maechler's split at ``-ln 2``).

    Above the split, where ``exp(x)`` is near 1, ``-expm1(x)`` keeps the digits; below it ``log1p`` does.
    """
    return torch.where(values > -math.log(2), torch.log(-torch.expm1(values)), torch.log1p(-torch.exp(values)))
