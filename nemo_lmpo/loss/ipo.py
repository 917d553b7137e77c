"""Identity preference optimization (Azar et al. 2024, arXiv:2310.12036)."""

from __future__ import annotations

from nemo_lmpo.loss.interface import LossInputs, LossOutputs
from nemo_lmpo.loss.numerics import log_ratios
from nemo_lmpo.loss.options import IPOConfig


def ipo_loss(inputs: LossInputs, config: IPOConfig) -> LossOutputs:
    """IPO per pair (its Eq. 17), ``[B]``.

    Formula: ``(rho_w - rho_l - 1 / (2 tau))^2`` where ``rho = S - S_ref``, or ``(S - S_ref) / n`` with
    ``config.average_log_probs``. Rewards are ``tau rho``: differences of them are drawn to 1/2.
    """
    ratio_w, ratio_l = log_ratios(inputs)
    if config.average_log_probs:
        ratio_w, ratio_l = ratio_w / inputs.chosen_lengths, ratio_l / inputs.rejected_lengths
    return LossOutputs((ratio_w - ratio_l - 1 / (2 * config.tau)) ** 2, config.tau * ratio_w, config.tau * ratio_l)
