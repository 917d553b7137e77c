"""Simple preference optimization (Meng et al. 2024, arXiv:2405.14734)."""

from __future__ import annotations

import torch.nn.functional as F

from nemo_lmpo.loss.interface import LossInputs, LossOutputs
from nemo_lmpo.loss.numerics import averages
from nemo_lmpo.loss.options import SimPOConfig


def simpo_loss(inputs: LossInputs, config: SimPOConfig) -> LossOutputs:
    """SimPO per pair (its Eq. 6), ``[B]``.

    Formula: ``-logsigmoid(beta (S_w / n_w - S_l / n_l) - gamma)``. Rewards are ``beta S / n``. LMPO with
    ``lam=0`` and ``log_h=gamma`` is the same function.
    """
    average_w, average_l = averages(inputs)
    losses = -F.logsigmoid(config.beta * (average_w - average_l) - config.gamma)
    return LossOutputs(losses, config.beta * average_w, config.beta * average_l)
