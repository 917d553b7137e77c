"""Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv:2402.01306) on pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_lmpo.loss.interface import LossInputs, LossOutputs, StatisticsConfig
from nemo_lmpo.loss.numerics import log_ratios
from nemo_lmpo.loss.options import KTOConfig


def kto_statistics(config: KTOConfig) -> StatisticsConfig:
    """The batch mean behind ``z``: of the whole global batch, before its losses, also in evaluation."""
    return StatisticsConfig(kind="batch_mean", update="before_step", in_evaluation=True)


def kto_observe(inputs: LossInputs, config: KTOConfig) -> Tensor:
    """Mean log-ratio of the two responses of each pair, ``[B]``; its batch mean estimates the KL."""
    ratio_w, ratio_l = log_ratios(inputs)
    return (ratio_w + ratio_l) / 2


def kto_loss(inputs: LossInputs, config: KTOConfig) -> LossOutputs:
    """KTO per pair, ``[B]``: the mean of the losses of its two responses.

    Formula, with ``rho = S - S_ref`` and sums ``S``::

        z    = beta max(0, mean over the global batch of (rho_w + rho_l) / 2)
        loss = (w_D (1 - sigmoid(beta rho_w - z)) + w_U (1 - sigmoid(z - beta rho_l))) / 2

    ``z`` is one reference point for all responses, as in the KTO paper, and a constant for the gradient; the caller
    hands its mean in as ``inputs.statistics.mean`` (``count`` 0: ``z = 0``). KTO estimates the KL divergence from
    responses paired with other prompts, which costs another forward pass each; on pairs the responses themselves
    serve, chosen and rejected alike (with only one half, ``z`` would follow what the loss itself does to it).
    Rewards are ``beta rho``.
    """
    ratio_w, ratio_l = log_ratios(inputs)
    mean = torch.as_tensor(inputs.statistics.mean, dtype=ratio_w.dtype, device=ratio_w.device)
    known = torch.as_tensor(inputs.statistics.count, device=ratio_w.device) > 0
    z = torch.where(known, config.beta * mean.clamp(min=0), torch.zeros_like(mean))
    # 1 - sigmoid(x) = sigmoid(-x), which keeps its digits where x is large.
    desirable = config.desirable_weight * torch.sigmoid(z - config.beta * ratio_w)
    undesirable = config.undesirable_weight * torch.sigmoid(config.beta * ratio_l - z)
    losses = (desirable + undesirable) / 2
    return LossOutputs(losses, config.beta * ratio_w, config.beta * ratio_l, {"kto/z": z.expand_as(ratio_w)})
