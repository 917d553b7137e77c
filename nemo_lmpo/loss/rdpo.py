"""Length-regularized DPO, R-DPO (Park et al. 2024, arXiv:2403.19159)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from nemo_lmpo.loss.interface import LossInputs, LossOutputs
from nemo_lmpo.loss.numerics import log_ratios
from nemo_lmpo.loss.options import FINITE, POSITIVE, PreferenceOptions, option


@dataclass(frozen=True)
class RDPOConfig(PreferenceOptions):
    """Options of R-DPO."""

    name: str = "rdpo"
    beta: float = option(0.01, FINITE, POSITIVE)
    """Strength of the pull to the reference. SimPO's appendix searches 0.01, 0.05, 0.1 and names no winner."""
    alpha: float = option(0.05, FINITE)
    """What a token of length explains of the preference: pairs with a longer chosen response push less, pairs with
    a shorter one more. SimPO's appendix searches 0.05, 0.1, 0.5, 1.0 and names no winner."""


def rdpo_loss(inputs: LossInputs, config: RDPOConfig) -> LossOutputs:
    """R-DPO per pair, ``[B]``.

    Formula: ``-logsigmoid(beta (rho_w - rho_l) + alpha (n_w - n_l))`` with ``rho = S - S_ref`` over sums. Rewards are
    ``beta rho``.
    """
    ratio_w, ratio_l = log_ratios(inputs)
    longer = inputs.chosen_lengths - inputs.rejected_lengths
    losses = -F.logsigmoid(config.beta * (ratio_w - ratio_l) + config.alpha * longer)
    return LossOutputs(losses, config.beta * ratio_w, config.beta * ratio_l)
