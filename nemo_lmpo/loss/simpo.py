"""Simple preference optimization (Meng et al. 2024, arXiv:2405.14734)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from nemo_lmpo.loss.checks import check_name, check_non_negative, check_positive
from nemo_lmpo.loss.interface import LossInputs, LossOutputs
from nemo_lmpo.loss.numerics import averages
from nemo_lmpo.loss.options import PreferenceOptions


@dataclass(frozen=True)
class SimPOConfig(PreferenceOptions):
    """Options of SimPO; the defaults are its Llama-3-Instruct setting.

    SimPO's README gives ``beta`` and the ratio ``gamma / beta`` per setting: Mistral-Base 2.0 and 0.8 (gamma 1.6),
    Mistral-Instruct 2.5 and 0.1 (0.25), Llama-3-Base 2.0 and 0.5 (1.0), Llama-3-Instruct 2.5 and 0.55 (1.375),
    Llama-3-Instruct v0.2 (pairs ranked by ArmoRM) 10 and 0.3 (3.0), Gemma 10 and 0.5 (5.0). It advises an additional
    ``sft_weight`` where likelihoods fall (its section on an extra SFT loss).
    """

    name: str = "simpo"
    beta: float = 2.5
    """Scale of the implicit reward ``beta S / n``."""
    gamma: float = 1.375
    """Target reward margin, absolute: not the ratio ``gamma / beta`` of SimPO's own configuration files."""

    def validate(self) -> None:
        """Check every option; raises ConfigError."""
        super().validate()
        check_name(self.name, "simpo")
        check_positive("beta", self.beta)
        check_non_negative("gamma", self.gamma)


def simpo_loss(inputs: LossInputs, config: SimPOConfig) -> LossOutputs:
    """SimPO per pair (its Eq. 6), ``[B]``.

    Formula: ``-logsigmoid(beta (S_w / n_w - S_l / n_l) - gamma)``. Rewards are ``beta S / n``. LMPO with
    ``lam=0`` and ``log_h=gamma`` is the same function.
    """
    average_w, average_l = averages(inputs)
    return LossOutputs(
        losses=-F.logsigmoid(config.beta * (average_w - average_l) - config.gamma),
        chosen_rewards=config.beta * average_w.detach(),
        rejected_rewards=config.beta * average_l.detach(),
    )
