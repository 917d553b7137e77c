"""Odds ratio preference optimization (Hong et al. 2024, arXiv:2403.07691)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from nemo_lmpo.loss.interface import LossInputs, LossOutputs
from nemo_lmpo.loss.numerics import averages, log1mexp
from nemo_lmpo.loss.options import ORPOConfig

LARGEST_LOG_PROBABILITY = -1e-6
"""Odds are infinite at probability 1: mean log-probabilities are kept below this in the odds, where the log-odds
are 13.8 and their gradient is 1e6; above, the odds have no gradient."""


def _log_odds(average: Tensor) -> Tensor:
    """``log(p / (1 - p))`` of ``p = exp(average)``."""
    average = average.clamp(max=LARGEST_LOG_PROBABILITY)
    return average - log1mexp(average)


def orpo_loss(inputs: LossInputs, config: ORPOConfig) -> LossOutputs:
    """ORPO per pair (its Eq. 6-7), ``[B]``.

    The likelihood is that of the response, as the paper writes it; TRL's trainer takes it over prompt and response
    together, averaged over the batch's tokens.

    Formula, with ``avg = S / n``: ``-avg_w - lambda logsigmoid(logodds(avg_w) - logodds(avg_l))`` where
    ``logodds(avg) = avg - log(1 - exp(avg))``. Rewards are ``lambda avg``.

    Metrics: ``orpo/log_odds_ratio``, the argument of the sigmoid.
    """
    average_w, average_l = averages(inputs)
    ratio = _log_odds(average_w) - _log_odds(average_l)
    losses = -average_w - config.lam * F.logsigmoid(ratio)
    return LossOutputs(losses, config.lam * average_w, config.lam * average_l, {"orpo/log_odds_ratio": ratio})
