"""Contrastive preference optimization (Xu et al. 2024, arXiv:2401.08417)."""

from __future__ import annotations

import torch.nn.functional as F

from nemo_lmpo.loss.interface import LossInputs, LossOutputs
from nemo_lmpo.loss.numerics import chosen_nll, sums
from nemo_lmpo.loss.options import CPOConfig


def cpo_loss(inputs: LossInputs, config: CPOConfig) -> LossOutputs:
    """CPO per pair, ``[B]``.

    Formula: ``-logsigmoid(beta (S_w - S_l)) + lambda nll_w`` with sums ``S`` = ``*_logps`` and ``nll_w`` =
    ``-S_w / n_w`` (or as ``config.nll`` says). Rewards are ``beta S``.
    """
    sum_w, sum_l = sums(inputs)
    losses = -F.logsigmoid(config.beta * (sum_w - sum_l)) + config.lam * chosen_nll(inputs, config.nll)
    return LossOutputs(losses, config.beta * sum_w, config.beta * sum_l)
