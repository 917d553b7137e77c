"""Sequence likelihood calibration, SLiC-HF (Zhao et al. 2023, arXiv:2305.10425)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F

from nemo_lmpo.loss.interface import LossInputs, LossOutputs
from nemo_lmpo.loss.numerics import chosen_nll, sums
from nemo_lmpo.loss.options import FINITE, NON_NEGATIVE, POSITIVE, PreferenceOptions, option


@dataclass(frozen=True)
class SLiCConfig(PreferenceOptions):
    """Options of SLiC-HF."""

    name: str = "slic"
    delta: float = option(1.0, FINITE, POSITIVE)
    """Wanted distance of the two log-probabilities, in nats. SimPO's appendix searches 0.5, 1.0, 2.0, 10.0
    and names no winner."""
    lam: float = option(0.1, FINITE, NON_NEGATIVE)
    """``lambda``, weight of the likelihood of the chosen response. SimPO's appendix searches 0.1, 0.5, 1.0, 10.0 and
    names no winner."""
    nll: Literal["mean", "token_mean", "sum"] = "sum"
    """How that likelihood is taken: `sum` over the response as SimPO's appendix prints it, its `mean`, or
    `token_mean` over all chosen tokens of the global batch."""


def slic_loss(inputs: LossInputs, config: SLiCConfig) -> LossOutputs:
    """SLiC-HF per pair, with the chosen response as the target of its regulariser, ``[B]``.

    Formula: ``max(0, delta - S_w + S_l) + lambda nll_w`` with sums ``S`` = ``*_logps`` and ``nll_w`` = ``-S_w`` (or as
    ``config.nll`` says). Rewards are ``S``, what the hinge compares.
    """
    sum_w, sum_l = sums(inputs)
    return LossOutputs(F.relu(config.delta - sum_w + sum_l) + config.lam * chosen_nll(inputs, config.nll), sum_w, sum_l)
