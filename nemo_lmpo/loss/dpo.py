"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from nemo_lmpo.loss.checks import check_name, check_positive
from nemo_lmpo.loss.interface import LossInputs, LossOutputs
from nemo_lmpo.loss.numerics import log_ratios


@dataclass(frozen=True)
class DPOConfig:
    """Options of DPO."""

    name: str = "dpo"
    beta: float = 0.01
    """Strength of the pull to the reference. 0.01 is the value of the Zephyr recipe of alignment-handbook, which
    the SimPO authors say they used for their DPO rows (princeton-nlp/SimPO, issue 23); their appendix searches
    0.01, 0.05, 0.1."""

    def validate(self) -> None:
        """Check every option; raises ConfigError."""
        check_name(self.name, "dpo")
        check_positive("beta", self.beta)


def dpo_loss(inputs: LossInputs, config: DPOConfig) -> LossOutputs:
    """DPO per pair (its Eq. 7), ``[B]``.

    Formula: ``-logsigmoid(beta ((S_w - S_ref_w) - (S_l - S_ref_l)))`` with sums ``S`` = ``*_logps`` and
    ``S_ref`` = ``reference_*_logps``. Rewards are ``beta (S - S_ref)``.
    """
    ratio_w, ratio_l = log_ratios(inputs)
    return LossOutputs(
        losses=-F.logsigmoid(config.beta * (ratio_w - ratio_l)),
        chosen_rewards=config.beta * ratio_w.detach(),
        rejected_rewards=config.beta * ratio_l.detach(),
    )
