"""Length-regularized DPO, R-DPO (Park et al. 2024, arXiv:2403.19159)."""

from __future__ import annotations

import torch.nn.functional as F

from nemo_lmpo.loss.interface import LossInputs, LossOutputs
from nemo_lmpo.loss.numerics import log_ratios
from nemo_lmpo.loss.options import RDPOConfig


def rdpo_loss(inputs: LossInputs, config: RDPOConfig) -> LossOutputs:
    """R-DPO per pair, ``[B]``.

    Formula: ``-logsigmoid(beta (rho_w - rho_l) + alpha (n_w - n_l))`` with ``rho = S - S_ref`` over sums. Rewards are
    ``beta rho``.
    """
    ratio_w, ratio_l = log_ratios(inputs)
    longer = inputs.chosen_lengths - inputs.rejected_lengths
    losses = -F.logsigmoid(config.beta * (ratio_w - ratio_l) + config.alpha * longer)
    return LossOutputs(losses, config.beta * ratio_w, config.beta * ratio_l)
