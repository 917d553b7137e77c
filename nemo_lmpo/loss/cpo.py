"""Contrastive preference optimization (Xu et al. 2024, arXiv:2401.08417)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F

from nemo_lmpo.loss.interface import LossInputs, LossOutputs
from nemo_lmpo.loss.numerics import chosen_nll, sums
from nemo_lmpo.loss.options import FINITE, NON_NEGATIVE, POSITIVE, PreferenceOptions, option


@dataclass(frozen=True)
class CPOConfig(PreferenceOptions):
    """Options of CPO."""

    name: str = "cpo"
    beta: float = option(0.01, FINITE, POSITIVE)
    """Scale of the compared log-probabilities. SimPO's appendix searches 0.01, 0.05, 0.1 and names no winner."""
    lam: float = option(1.0, FINITE, NON_NEGATIVE)
    """``lambda``, weight of the likelihood of the chosen response; 1.0 in SimPO's appendix and in the CPO author's own
    trainer (TRL's, pull request 1382)."""
    nll: Literal["mean", "token_mean", "sum"] = field(default="mean", metadata={"absent_means": "sum"})
    """How that likelihood is taken. `mean` per token of the response, for which 0.01 and 1.0 are published: the CPO
    author's trainer does so (with one pair a micro-batch; with more it is `token_mean`, over all chosen tokens of
    the batch). `sum` is what the CPO and SimPO papers print; the preference is then about 1 % of the gradient."""


def cpo_loss(inputs: LossInputs, config: CPOConfig) -> LossOutputs:
    """CPO per pair, ``[B]``.

    Formula: ``-logsigmoid(beta (S_w - S_l)) + lambda nll_w`` with sums ``S`` = ``*_logps`` and ``nll_w`` =
    ``-S_w / n_w`` (or as ``config.nll`` says). Rewards are ``beta S``.
    """
    sum_w, sum_l = sums(inputs)
    losses = -F.logsigmoid(config.beta * (sum_w - sum_l)) + config.lam * chosen_nll(inputs, config.nll)
    return LossOutputs(losses, config.beta * sum_w, config.beta * sum_l)
