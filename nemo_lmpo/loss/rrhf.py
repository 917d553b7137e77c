"""Rank responses to align human feedback, RRHF (Yuan et al. 2023, arXiv:2304.05302), on pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F

from nemo_lmpo.loss.interface import LossInputs, LossOutputs
from nemo_lmpo.loss.numerics import averages, chosen_nll
from nemo_lmpo.loss.options import FINITE, NON_NEGATIVE, PreferenceOptions, option


@dataclass(frozen=True)
class RRHFConfig(PreferenceOptions):
    """Options of RRHF."""

    name: str = "rrhf"
    lam: float = option(1.0, FINITE, NON_NEGATIVE)
    """``lambda``, weight of the likelihood of the chosen response; 1 in RRHF's own loss. SimPO's appendix searches
    0.1, 0.5, 1.0, 10.0 and names no winner."""
    nll: Literal["mean", "token_mean", "sum"] = "sum"
    """How that likelihood is taken: `sum` over the response as SimPO's appendix prints it, its `mean`, or
    `token_mean` over all chosen tokens of the global batch."""


def rrhf_loss(inputs: LossInputs, config: RRHFConfig) -> LossOutputs:
    """RRHF per pair, ``[B]``.

    Formula: ``max(0, S_l / n_l - S_w / n_w) + lambda nll_w`` with ``nll_w`` = ``-S_w`` (or as ``config.nll`` says).
    Rewards are ``S / n``, what the hinge compares.
    """
    average_w, average_l = averages(inputs)
    losses = F.relu(average_l - average_w) + config.lam * chosen_nll(inputs, config.nll)
    return LossOutputs(losses, average_w, average_l)
