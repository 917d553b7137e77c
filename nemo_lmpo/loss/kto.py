"""Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv:2402.01306) on pairs and on answers with a label."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_lmpo.loss.interface import (
    LossInputs,
    LossOutputs,
    ResponseInputs,
    ResponseOutputs,
    Statistics,
    StatisticsConfig,
)
from nemo_lmpo.loss.numerics import log_ratios, response_log_ratios
from nemo_lmpo.loss.options import KTOConfig


def kto_statistics(config: KTOConfig) -> StatisticsConfig | None:
    """The batch mean behind ``z``: of the whole global batch, before its losses, also in evaluation."""
    if config.reference_point == "zero":
        return None
    return StatisticsConfig(kind="batch_mean", update="before_step", in_evaluation=True)


def kto_observe(inputs: LossInputs, config: KTOConfig) -> Tensor:
    """Mean log-ratio of the two responses of each pair, ``[B]``; its batch mean estimates the KL."""
    ratio_w, ratio_l = log_ratios(inputs)
    return (ratio_w + ratio_l) / 2


def kto_observe_responses(inputs: ResponseInputs, config: KTOConfig) -> Tensor:
    """Log-ratio of each response, ``[B]``; its mean over answers to other prompts estimates the KL."""
    return response_log_ratios(inputs)


def _reference_point(statistics: Statistics, like: Tensor, config: KTOConfig) -> Tensor:
    """``z = beta max(0, mean)``, and 0 as long as there is no mean."""
    mean = torch.as_tensor(statistics.mean, dtype=like.dtype, device=like.device)
    known = torch.as_tensor(statistics.count, device=like.device) > 0
    return torch.where(known, config.beta * mean.clamp(min=0), torch.zeros_like(mean))


def kto_loss(inputs: LossInputs, config: KTOConfig) -> LossOutputs:
    """KTO per pair, ``[B]``: the mean of the losses of its two responses.

    Formula, with ``rho = S - S_ref`` and sums ``S``::

        z    = beta max(0, mean over the global batch of (rho_w + rho_l) / 2)
        loss = (w_D (1 - sigmoid(beta rho_w - z)) + w_U (1 - sigmoid(z - beta rho_l))) / 2

    ``z`` is one reference point for all responses, as in the KTO paper, and a constant for the gradient; the caller
    hands its mean in as ``inputs.statistics.mean`` (``count`` 0: ``z = 0``). KTO estimates the KL divergence from
    responses paired with other prompts, which costs another forward pass each; on pairs the responses themselves
    serve, chosen and rejected alike (with only one half, ``z`` would follow what the loss itself does to it).
    ``config.reference_point`` ``zero`` is ``z = 0``. Rewards are ``beta rho``.
    """
    ratio_w, ratio_l = log_ratios(inputs)
    z = _reference_point(inputs.statistics, ratio_w, config)
    # 1 - sigmoid(x) = sigmoid(-x), which keeps its digits where x is large.
    desirable = config.desirable_weight * torch.sigmoid(z - config.beta * ratio_w)
    undesirable = config.undesirable_weight * torch.sigmoid(config.beta * ratio_l - z)
    losses = (desirable + undesirable) / 2
    return LossOutputs(losses, config.beta * ratio_w, config.beta * ratio_l, {"kto/z": z.expand_as(ratio_w)})


def kto_loss_of_responses(inputs: ResponseInputs, config: KTOConfig) -> ResponseOutputs:
    """KTO per answer with a label, ``[B]``, as published (its Eq. 7 and 8, up to the constant ``lambda_y``).

    Formula, with ``rho = S - S_ref`` and sums ``S``::

        z    = beta max(0, mean of rho over answers laid behind other prompts)
        loss = w_D (1 - sigmoid(beta rho - z))   of desirable answers
               w_U (1 - sigmoid(z - beta rho))   of undesirable ones

    The caller takes the mean from a forward pass over the mismatched answers of the global batch and hands it in as
    ``inputs.statistics.mean``, a constant for the gradient. Rewards are ``beta rho``; an answer counts as right where
    its reward lies on its label's side of ``z``.
    """
    ratio = response_log_ratios(inputs)
    assert inputs.desirable is not None  # no data without labels comes here
    z = _reference_point(inputs.statistics, ratio, config)
    rewards = config.beta * ratio
    desirable = config.desirable_weight * torch.sigmoid(z - rewards)
    undesirable = config.undesirable_weight * torch.sigmoid(rewards - z)
    losses = torch.where(inputs.desirable, desirable, undesirable)
    right = torch.where(inputs.desirable, rewards > z, rewards < z)
    metrics = {"kto/z": z.expand_as(ratio), "rewards/accuracies": right.to(ratio.dtype)}
    return ResponseOutputs(losses, metrics, rewards)
