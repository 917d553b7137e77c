"""Supervised fine-tuning on the chosen responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemo_lmpo.loss.interface import LossInputs, LossOutputs
from nemo_lmpo.loss.numerics import averages, chosen_nll
from nemo_lmpo.loss.options import LossOptions


@dataclass(frozen=True)
class SFTConfig(LossOptions):
    """Options of SFT."""

    name: str = "sft"
    nll: Literal["mean", "token_mean", "sum"] = "mean"
    """How the likelihood is taken: the `mean` of a response, so that all responses weigh the same; `token_mean` over
    all chosen tokens of the global batch, as TRL and other SFT trainers do; or the `sum`."""


def sft_loss(inputs: LossInputs, config: SFTConfig) -> LossOutputs:
    """SFT per pair, ``[B]``: the negative log-likelihood of the chosen response.

    Formula: ``-S_w / n_w`` (or as ``config.nll`` says). The rejected response has no part in the loss; its reward is
    computed to be looked at. Rewards are ``S / n``.
    """
    average_w, average_l = averages(inputs)
    return LossOutputs(chosen_nll(inputs, config.nll), average_w, average_l)
