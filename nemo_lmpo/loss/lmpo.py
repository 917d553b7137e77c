"""Length-controlled margin-based preference optimization (LMPO), Section 3.3 of the paper."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_lmpo.loss import margins
from nemo_lmpo.loss.interface import LossInputs, LossOutputs, Statistics, StatisticsConfig
from nemo_lmpo.loss.numerics import averages
from nemo_lmpo.loss.options import (
    DEFAULT_MOMENTUM,
    RELEASED_EVALUATION_GROUP_SIZE,
    RELEASED_GROUP_SIZE,
    LMPOConfig,
)


def lmpo_statistics(config: LMPOConfig) -> StatisticsConfig | None:
    """The running statistics ``a``, ``b`` of the margin that ``config`` asks for (Eq. 20-22)."""
    if not config.z_score:
        return None
    released = config.compat == "released_code"
    return StatisticsConfig(
        kind=config.statistics,
        update="before_step" if released else "after_step",
        momentum=DEFAULT_MOMENTUM if config.momentum is None else config.momentum,
        eps=config.resolved_std_floor,
        bias_correction=not released,
        in_evaluation=released,
        group_size=(config.group_size or RELEASED_GROUP_SIZE) if released else None,
        evaluation_group_size=(config.group_size or RELEASED_EVALUATION_GROUP_SIZE) if released else None,
        log_as="lmpo",
    )


def _probabilities(inputs: LossInputs, config: LMPOConfig) -> tuple[Tensor, Tensor]:
    """``p_w`` and ``p_l`` ``[B]``: ``exp(S / n * (n_w + n_l) / (2 n))``, Eq. 8."""
    chosen, rejected = averages(inputs)
    if config.average_length_normalization:
        # Each sequence's own length divides: the shorter response's exponent grows, the longer one's shrinks.
        mean_length = (inputs.chosen_lengths + inputs.rejected_lengths) / 2
        chosen = chosen * (mean_length / inputs.chosen_lengths)
        rejected = rejected * (mean_length / inputs.rejected_lengths)
    return chosen.exp(), rejected.exp()


def _margin(p_w: Tensor, p_l: Tensor, config: LMPOConfig) -> Tensor:
    function = margins.released_margin if config.compat == "released_code" else margins.paper_margin
    alpha = margins.DEFAULT_ALPHA if config.alpha is None else config.alpha
    beta_s = margins.DEFAULT_BETA_S if config.beta_s is None else config.beta_s
    margin = function(config.margin, p_w, p_l, alpha, beta_s)
    return margin.detach() if config.resolved_detach_margin else margin


def lmpo_observe(inputs: LossInputs, config: LMPOConfig) -> Tensor:
    """The margins ``m`` ``[B]``: what the running statistics are taken of."""
    return _margin(*_probabilities(inputs, config), config)


def _normalized(margin: Tensor, statistics: Statistics, config: LMPOConfig) -> Tensor:
    """``mbar`` ``[B]`` (Eq. 9); 0 where nothing is known yet."""
    if not config.z_score:
        return margin
    mean = torch.as_tensor(statistics.mean, dtype=margin.dtype, device=margin.device)
    std = torch.as_tensor(statistics.std, dtype=margin.dtype, device=margin.device)
    known = torch.as_tensor(statistics.count, device=margin.device) > 0
    normalized = (margin - mean) / std.clamp(min=config.resolved_std_floor)
    return torch.where(known, normalized, torch.zeros_like(margin))


def lmpo_loss(inputs: LossInputs, config: LMPOConfig) -> LossOutputs:
    """LMPO per pair (Eq. 7-11), ``[B]``.

    Formula::

        p    = exp(S / n * (n_w + n_l) / (2 n))            Eq. 8
        m    = (1 - p_w) * (1 - (p_w - p_l)^5)             Eq. 7
        mbar = (m - a) / b                                 Eq. 9
        d    = beta S_w / n_w - beta S_l / n_l - lam mbar  Eq. 11
        loss = softplus(ln h - d)                          Eq. 10: -ln(1 / (1 + h exp(-d)))

    Symbols: ``S`` = ``*_logps``, ``n`` = ``*_lengths``, ``a``, ``b`` = ``inputs.statistics`` (constants for the
    gradient), ``lambda`` = ``config.lam``, ``h`` = ``exp(config.resolved_log_h)``. While the statistics are empty,
    ``mbar = 0``; with ``config.z_score`` off, ``mbar = m``.

    Rewards are ``beta * S / n``. Metrics: ``lmpo/margin`` (``m``), ``lmpo/margin_normalized`` (``mbar``),
    ``lmpo/p_chosen``, ``lmpo/p_rejected``.
    """
    average_w, average_l = averages(inputs)
    p_w, p_l = _probabilities(inputs, config)
    margin = _margin(p_w, p_l, config)
    normalized = _normalized(margin, inputs.statistics, config)
    reward_w, reward_l = config.beta * average_w, config.beta * average_l
    d = reward_w - reward_l - config.lam * normalized
    return LossOutputs(
        # softplus(ln h - d) by its exact identity: torch's softplus turns linear at 20, this one never does.
        losses=-F.logsigmoid(d - config.resolved_log_h),
        chosen_rewards=reward_w,
        rejected_rewards=reward_l,
        metrics={
            "lmpo/margin": margin,
            "lmpo/margin_normalized": normalized,
            "lmpo/p_chosen": p_w,
            "lmpo/p_rejected": p_l,
        },
    )
