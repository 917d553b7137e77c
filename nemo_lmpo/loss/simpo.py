"""Simple preference optimization (Meng et al. 2024, arXiv:2405.14734)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from nemo_lmpo.loss.interface import LossInputs, LossOutputs
from nemo_lmpo.loss.numerics import averages
from nemo_lmpo.loss.options import FINITE, NON_NEGATIVE, POSITIVE, PreferenceOptions, option


@dataclass(frozen=True)
class SimPOConfig(PreferenceOptions):
    """Options of SimPO; the defaults are its Llama-3-Instruct setting.

    SimPO's README gives ``beta`` and the ratio ``gamma / beta`` per setting: Mistral-Base 2.0 and 0.8 (gamma 1.6),
    Mistral-Instruct 2.5 and 0.1 (0.25), Llama-3-Base 2.0 and 0.5 (1.0), Llama-3-Instruct 2.5 and 0.55 (1.375),
    Llama-3-Instruct v0.2 (pairs ranked by ArmoRM) 10 and 0.3 (3.0), Gemma 10 and 0.5 (5.0). It advises an additional
    ``sft_weight`` where likelihoods fall (its section on an extra SFT loss).
    """

    name: str = "simpo"
    beta: float = option(2.5, FINITE, POSITIVE)
    """Scale of the implicit reward ``beta S / n``."""
    gamma: float = option(1.375, FINITE, NON_NEGATIVE)
    """Target reward margin, absolute: not the ratio ``gamma / beta`` of SimPO's own configuration files."""


def simpo_loss(inputs: LossInputs, config: SimPOConfig) -> LossOutputs:
    """SimPO per pair (its Eq. 6), ``[B]``.

    Formula: ``-logsigmoid(beta (S_w / n_w - S_l / n_l) - gamma)``. Rewards are ``beta S / n``. LMPO with
    ``lam=0`` and ``log_h=gamma`` is the same function.
    """
    average_w, average_l = averages(inputs)
    losses = -F.logsigmoid(config.beta * (average_w - average_l) - config.gamma)
    return LossOutputs(losses, config.beta * average_w, config.beta * average_l)
