"""Supervised fine-tuning on the chosen responses."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_lmpo.loss.checks import check_name
from nemo_lmpo.loss.interface import LossInputs, LossOutputs
from nemo_lmpo.loss.numerics import averages


@dataclass(frozen=True)
class SFTConfig:
    """SFT has no options."""

    name: str = "sft"

    def validate(self) -> None:
        """Nothing but the name can be wrong."""
        check_name(self.name, "sft")


def sft_loss(inputs: LossInputs, config: SFTConfig) -> LossOutputs:
    """SFT per pair, ``[B]``: the negative mean log-probability of the chosen response.

    Formula: ``-S_w / n_w``. Every response weighs the same whatever its length. The rejected response has no
    part in the loss; its reward is computed to be looked at. Rewards are ``S / n``.
    """
    average_w, average_l = averages(inputs)
    return LossOutputs(losses=-average_w, chosen_rewards=average_w.detach(), rejected_rewards=average_l.detach())
