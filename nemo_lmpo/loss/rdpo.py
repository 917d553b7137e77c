"""Length-regularized DPO, R-DPO (Park et al. 2024, arXiv:2403.19159)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from nemo_lmpo.loss.checks import check_finite, check_name, check_positive
from nemo_lmpo.loss.interface import LossInputs, LossOutputs
from nemo_lmpo.loss.numerics import log_ratios
from nemo_lmpo.loss.options import PreferenceOptions


@dataclass(frozen=True)
class RDPOConfig(PreferenceOptions):
    """Options of R-DPO."""

    name: str = "rdpo"
    beta: float = 0.01
    """Strength of the pull to the reference. SimPO's appendix searches 0.01, 0.05, 0.1 and names no winner."""
    alpha: float = 0.05
    """What a token of length explains of the preference: pairs with a longer chosen response push less, pairs with
    a shorter one more. SimPO's appendix searches 0.05, 0.1, 0.5, 1.0 and names no winner."""

    def validate(self) -> None:
        """Check every option; raises ConfigError."""
        super().validate()
        check_name(self.name, "rdpo")
        check_positive("beta", self.beta)
        check_finite("alpha", self.alpha)


def rdpo_loss(inputs: LossInputs, config: RDPOConfig) -> LossOutputs:
    """R-DPO per pair, ``[B]``.

    Formula: ``-logsigmoid(beta (rho_w - rho_l) + alpha (n_w - n_l))`` with ``rho = S - S_ref`` over sums. Rewards are
    ``beta rho``.
    """
    ratio_w, ratio_l = log_ratios(inputs)
    longer = inputs.chosen_lengths - inputs.rejected_lengths
    return LossOutputs(
        losses=-F.logsigmoid(config.beta * (ratio_w - ratio_l) + config.alpha * longer),
        chosen_rewards=config.beta * ratio_w.detach(),
        rejected_rewards=config.beta * ratio_l.detach(),
    )
