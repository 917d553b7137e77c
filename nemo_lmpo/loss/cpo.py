"""Contrastive preference optimization (Xu et al. 2024, arXiv:2401.08417)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from nemo_lmpo.loss.checks import check_name, check_non_negative, check_positive
from nemo_lmpo.loss.interface import LossInputs, LossOutputs
from nemo_lmpo.loss.numerics import sums


@dataclass(frozen=True)
class CPOConfig:
    """Options of CPO."""

    name: str = "cpo"
    beta: float = 0.01
    """Scale of the compared log-probabilities. SimPO's appendix searches 0.01, 0.05, 0.1 and names no winner."""
    lam: float = 1.0
    """``lambda``, weight of the likelihood of the chosen response; 1.0 in SimPO's appendix."""

    def validate(self) -> None:
        """Check every option; raises ConfigError."""
        check_name(self.name, "cpo")
        check_positive("beta", self.beta)
        check_non_negative("lam", self.lam)


def cpo_loss(inputs: LossInputs, config: CPOConfig) -> LossOutputs:
    """CPO per pair, ``[B]``.

    Formula: ``-logsigmoid(beta (S_w - S_l)) - lambda S_w`` with sums ``S`` = ``*_logps``. Some implementations
    take the mean per token in the second term; this is the sum, as both papers print it. Rewards are ``beta S``.
    """
    sum_w, sum_l = sums(inputs)
    return LossOutputs(
        losses=-F.logsigmoid(config.beta * (sum_w - sum_l)) - config.lam * sum_w,
        chosen_rewards=config.beta * sum_w.detach(),
        rejected_rewards=config.beta * sum_l.detach(),
    )
