"""Supervised fine-tuning on the chosen responses."""

from __future__ import annotations

from nemo_lmpo.loss.interface import LossInputs, LossOutputs
from nemo_lmpo.loss.numerics import averages, chosen_nll
from nemo_lmpo.loss.options import SFTConfig


def sft_loss(inputs: LossInputs, config: SFTConfig) -> LossOutputs:
    """SFT per pair, ``[B]``: the negative log-likelihood of the chosen response.

    Formula: ``-S_w / n_w`` (or as ``config.nll`` says). The rejected response has no part in the loss; its reward is
    computed to be looked at. Rewards are ``S / n``.
    """
    average_w, average_l = averages(inputs)
    return LossOutputs(chosen_nll(inputs, config.nll), average_w, average_l)
