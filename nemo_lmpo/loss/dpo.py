"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290)."""

from __future__ import annotations

import torch.nn.functional as F

from nemo_lmpo.loss.interface import LossInputs, LossOutputs
from nemo_lmpo.loss.numerics import log_ratios, shared_log_ratios
from nemo_lmpo.loss.options import DPOConfig


def dpo_needs_shared(config: DPOConfig) -> bool:
    """Whether the loss needs ``*_shared_logps``: LD-DPO does."""
    return config.ld_alpha is not None


def dpo_loss(inputs: LossInputs, config: DPOConfig) -> LossOutputs:
    """DPO per pair (its Eq. 7), ``[B]``.

    Formula: ``-logsigmoid(beta (rho_w - rho_l))`` where ``rho = S - S_ref`` with sums ``S`` = ``*_logps`` and
    ``S_ref`` = ``reference_*_logps``; with ``config.average_log_probs`` ``rho / n``. LD-DPO splits ``rho`` after
    ``min(n_w, n_l)`` tokens: ``rho_shared + ld_alpha (rho - rho_shared)``. Rewards are ``beta rho``.
    """
    ratio_w, ratio_l = log_ratios(inputs)
    if config.ld_alpha is not None:
        shared_w, shared_l = shared_log_ratios(inputs)
        ratio_w = shared_w + config.ld_alpha * (ratio_w - shared_w)
        ratio_l = shared_l + config.ld_alpha * (ratio_l - shared_l)
    if config.average_log_probs:
        ratio_w, ratio_l = ratio_w / inputs.chosen_lengths, ratio_l / inputs.rejected_lengths
    return LossOutputs(-F.logsigmoid(config.beta * (ratio_w - ratio_l)), config.beta * ratio_w, config.beta * ratio_l)
