"""Rank responses to align human feedback, RRHF (Yuan et al. 2023, arXiv:2304.05302), on pairs."""

from __future__ import annotations

import torch.nn.functional as F

from nemo_lmpo.loss.interface import LossInputs, LossOutputs
from nemo_lmpo.loss.numerics import averages, chosen_nll
from nemo_lmpo.loss.options import RRHFConfig


def rrhf_loss(inputs: LossInputs, config: RRHFConfig) -> LossOutputs:
    """RRHF per pair, ``[B]``.

    Formula: ``max(0, S_l / n_l - S_w / n_w) + lambda nll_w`` with ``nll_w`` = ``-S_w`` (or as ``config.nll`` says).
    Rewards are ``S / n``, what the hinge compares.
    """
    average_w, average_l = averages(inputs)
    losses = F.relu(average_l - average_w) + config.lam * chosen_nll(inputs, config.nll)
    return LossOutputs(losses, average_w, average_l)
