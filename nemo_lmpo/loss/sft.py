"""Supervised fine-tuning: on conversations, or on the chosen responses of pairs."""

from __future__ import annotations

from nemo_lmpo.loss.interface import LossInputs, LossOutputs, ResponseInputs, ResponseOutputs
from nemo_lmpo.loss.numerics import averages, chosen_nll, nll
from nemo_lmpo.loss.options import SFTConfig


def sft_loss(inputs: LossInputs, config: SFTConfig) -> LossOutputs:
    """SFT per pair, ``[B]``: the negative log-likelihood of the chosen response.

    Formula: ``-S_w / n_w`` (or as ``config.nll`` says). The rejected response has no part in the loss; its reward is
    computed to be looked at. Rewards are ``S / n``.
    """
    average_w, average_l = averages(inputs)
    return LossOutputs(chosen_nll(inputs, config.nll or "mean"), average_w, average_l)


def sft_loss_of_responses(inputs: ResponseInputs, config: SFTConfig) -> ResponseOutputs:
    """SFT per conversation, ``[B]``: the negative log-likelihood of all that is predicted of it.

    Formula: ``-S / mean n`` (or as ``config.nll`` says), whose batch mean is the mean over the predicted tokens of the
    global batch.
    """
    return ResponseOutputs(nll(inputs.logps, inputs.lengths, inputs.mean_length, config.nll or "token_mean"))
