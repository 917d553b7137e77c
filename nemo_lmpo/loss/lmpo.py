"""Length-controlled margin-based preference optimization (LMPO), Section 3.3 of the paper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_lmpo.errors import ConfigError
from nemo_lmpo.loss import margins
from nemo_lmpo.loss.interface import LossInputs, LossOutputs, Statistics, StatisticsConfig
from nemo_lmpo.loss.numerics import averages
from nemo_lmpo.loss.options import FINITE, NON_NEGATIVE, POSITIVE, PreferenceOptions, option

DEFAULT_LOG_H = 1.4
DEFAULT_MOMENTUM = 0.9
PAPER_STD_FLOOR = 0.01
"""What rounding alone does to the margin of an answer of ten tokens in bfloat16: logits between 16 and 32 are 1/8
apart, an error of 1/8 / sqrt(12) = 0.036 a token and 0.011 in the mean of ten, and the margin moves by at most as much
as the mean does (``p_w |dm/dp_w| <= 1``). Margins that differ by less are equal, and a normalization by less would
blow up noise: see docs/losses.md, which says what the floor bounds."""
RELEASED_STD_FLOOR = 1e-6
"""The authors' trainer has no floor; this only keeps a division by zero away."""
RELEASED_GROUP_SIZE = 8
"""Pairs of a micro-batch of the authors: 2 a GPU (their training configurations), gathered over 4 GPUs (their
accelerate configuration)."""
RELEASED_EVALUATION_GROUP_SIZE = 16
"""The same in evaluation, where they take 4 a GPU."""


@dataclass(frozen=True)
class LMPOConfig(PreferenceOptions):
    """Options of LMPO; the defaults are the paper's for Llama-3-Instruct 8B (Table 5).

    Options that default to None belong to one choice of another option and are an error where that choice is not
    made, so that a setting without effect cannot go unnoticed.
    """

    name: str = "lmpo"
    beta: float = option(2.5, FINITE, POSITIVE)
    """Scale of the implicit reward ``beta * S / n`` (Eq. 5)."""
    h: float | None = option(None, FINITE, POSITIVE)
    """Home advantage (Eq. 10), greater than 0; 1 turns it off. Give this or ``log_h``."""
    log_h: float | None = option(None, FINITE)
    """``ln h``; 0 turns the home advantage off. Neither given: 1.4."""
    lam: float = option(0.2, FINITE, NON_NEGATIVE)
    """``lambda``, weight of the normalised margin (Eq. 11)."""
    compat: Literal["paper", "released_code"] = "paper"
    """`paper`: the equations as printed. `released_code`: what the authors' trainer does (margin halved and
    without gradient, statistics from zero without bias correction, updated before use by every micro-batch of
    ``group_size`` pairs, in evaluation too)."""
    margin: Literal["power5", "log", "cube", "sigmoid"] = "power5"
    """Margin function: `power5` (Eq. 7), `log`, `cube` or `sigmoid` (Section 4.2)."""
    alpha: float | None = option(None, FINITE, POSITIVE)
    """Constant of `margin: log`; unset: 5, from the authors' trainer (the paper gives none)."""
    beta_s: float | None = option(None, FINITE, POSITIVE)
    """Constant of `margin: sigmoid`; unset: 0.1, from the authors' trainer (the paper gives none)."""
    average_length_normalization: bool = True
    """Scale the exponent of ``p`` by ``(n_w + n_l) / (2 n)`` (Eq. 8); off: ``p = exp(S / n)``."""
    detach_margin: bool | None = None
    """Whether the margin is a constant for the gradient; unset: as ``compat`` has it (App. A derives it with)."""
    z_score: bool = True
    """Normalise the margin by running statistics (Eq. 9); off: ``mbar = m``."""
    statistics: Literal["ema", "cumulative"] = "ema"
    """`ema` (Eq. 21-22) or `cumulative` (mean and deviation over all pairs so far, Eq. 9 read literally)."""
    momentum: float | None = option(None, ("at least 0 and less than 1", lambda value: 0 <= value < 1))
    """Weight of the past in `statistics: ema`; unset: 0.9."""
    group_size: int | None = option(None, ("2 or more; one pair has no deviation", lambda value: value >= 2))
    """Pairs of a micro-batch of `compat: released_code`, in the order in which the data comes, however the model's own
    micro-batches are laid; unset: 8 (the authors' 4 GPUs of 2 pairs), and 16 in evaluation (of 4)."""
    std_floor: float | None = option(None, FINITE, POSITIVE)
    """The margin is never divided by less than this; unset: 0.01, and 1e-6 with `compat: released_code`."""

    @property
    def resolved_log_h(self) -> float:
        """``ln h`` from whichever of the two was given."""
        if self.log_h is not None:
            return self.log_h
        return math.log(self.h) if self.h is not None else DEFAULT_LOG_H

    @property
    def resolved_std_floor(self) -> float:
        """The least standard deviation that divides."""
        if self.std_floor is not None:
            return self.std_floor
        return RELEASED_STD_FLOOR if self.compat == "released_code" else PAPER_STD_FLOOR

    @property
    def resolved_detach_margin(self) -> bool:
        """Whether the margin is a constant for the gradient."""
        return self.compat == "released_code" if self.detach_margin is None else self.detach_margin

    def validate(self) -> None:
        """Check every option and every combination.

        Raises:
            ConfigError: Naming the option, its value and the remedy.
        """
        super().validate()
        if self.h is not None and self.log_h is not None and abs(math.log(self.h) - self.log_h) > 1e-6:
            raise ConfigError(
                f"loss.h={self.h!r} and loss.log_h={self.log_h!r} disagree: ln h is {math.log(self.h):.6g}. "
                "Give only one of them (set the other to null)."
            )
        self._validate_margin_constants()
        self._validate_statistics()

    def _validate_margin_constants(self) -> None:
        for name, value, margin in (("alpha", self.alpha, "log"), ("beta_s", self.beta_s, "sigmoid")):
            if value is not None and self.margin != margin:
                raise ConfigError(
                    f"loss.{name}={value!r}: only loss.margin={margin} uses it, and loss.margin={self.margin}. "
                    f"Leave it out, or set loss.margin={margin}."
                )

    def _validate_statistics(self) -> None:
        if not self.z_score:
            self._refuse_statistics_options()
        if self.statistics == "cumulative" and self.momentum is not None:
            raise ConfigError(
                f"loss.momentum={self.momentum!r}: loss.statistics=cumulative has none. "
                "Leave it out, or set loss.statistics=ema."
            )
        if self.statistics == "cumulative" and self.compat == "released_code":
            raise ConfigError(
                "loss.statistics='cumulative': the released code keeps moving averages. "
                "Set loss.statistics=ema, or loss.compat=paper."
            )
        if self.group_size is not None and self.compat != "released_code":
            raise ConfigError(
                f"loss.group_size={self.group_size!r}: only loss.compat=released_code uses it, and loss.compat="
                f"{self.compat}. Leave it out, or set loss.compat=released_code."
            )

    def _refuse_statistics_options(self) -> None:
        given: dict[str, Any] = {name: getattr(self, name) for name in ("momentum", "group_size", "std_floor")}
        given["statistics"] = None if self.statistics == "ema" else self.statistics
        for name, value in given.items():
            if value is not None:
                raise ConfigError(
                    f"loss.{name}={value!r}: loss.z_score=false keeps no statistics. "
                    "Leave it out, or set loss.z_score=true."
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
