"""The options of every loss, a dataclass each, with the only defaults.

Torch is not imported here, so that a wrong option is refused before it is loaded. The losses themselves are in the
other files, one each.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from nemo_lmpo.errors import ConfigError, one_per_line, shown
from nemo_lmpo.settings import all_out_of_bounds, setting

DEFAULT_LOSS = "lmpo"
DEFAULT_LOG_H = 1.4
DEFAULT_MOMENTUM = 0.9
PAPER_STD_FLOOR = 0.01
"""What rounding alone does to the margin of an answer of ten tokens in bfloat16: logits between 16 and 32 are 1/8
apart, an error of 1/8 / sqrt(12) = 0.036 per token and 0.011 in the mean of ten, and the margin moves by at most as
much as the mean does (``p_w |dm/dp_w| <= 1``). Margins that differ by less are equal, and a normalization by less would
blow up noise: see docs/losses.md, which says what the floor bounds."""
RELEASED_STD_FLOOR = 1e-6
"""The authors' trainer has no floor; this only keeps a division by zero away."""
RELEASED_GROUP_SIZE = 8
"""Pairs of a micro-batch of the authors: 2 per GPU (their training configurations), gathered over 4 GPUs (their
accelerate configuration)."""
RELEASED_EVALUATION_GROUP_SIZE = 16
"""The same in evaluation, where they take 4 per GPU."""


@dataclass(frozen=True)
class LossOptions:
    """The base of every loss's options."""

    name: str = ""
    needs_reference: ClassVar[bool] = False
    """Whether the loss compares with a frozen reference model."""
    takes: ClassVar[tuple[str, ...]] = ("pairs",)
    """The forms of rows that it trains on: `pairs`, `conversations`, `labels` (single answers, good or bad)."""

    def combinations(self) -> Iterator[str]:
        """A sentence for every combination of options that does not make sense; single options are valid here."""
        yield from ()

    def validate(self) -> None:
        """Check every option and every combination.

        Raises:
            ConfigError: with a sentence per problem, one a line: the option, its value and the remedy.
        """
        problems = [*all_out_of_bounds(self, "loss."), *self._unknown_choices()]
        problems = problems or list(self.combinations())
        if problems:
            raise ConfigError(one_per_line(problems))

    def _unknown_choices(self) -> Iterator[str]:
        choices = _choices(typing.cast(Any, type(self)))
        for of in dataclasses.fields(self):
            value = getattr(self, of.name)
            if of.name == "name" and value != of.default:  # another name would be another loss's options
                yield f"loss.name={shown(value)}: these are the options of {of.default}; leave the name unset"
            elif value not in choices.get(of.name, (value,)):
                yield f"loss.{of.name}={shown(value)} is unknown; choose {', '.join(filter(None, choices[of.name]))}"


@functools.cache
def _choices(options: Any) -> dict[str, tuple[Any, ...]]:
    """What the options of a class that are a choice may be, by name."""
    hints = typing.get_type_hints(options).items()
    found: dict[str, tuple[Any, ...]] = {}
    for name, hint in hints:
        arms = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
        values = [arm for arm in arms if typing.get_origin(arm) is typing.Literal]
        if values:
            found[name] = (*typing.get_args(values[0]), *((None,) if types.NoneType in arms else ()))
    return found


@dataclass(frozen=True)
class PreferenceOptions(LossOptions):
    """The base of a preference loss's options."""

    sft_weight: float = setting(0.0, minimum=0)
    """Weight of ``-S_w / n_w``, the mean negative log-likelihood of the chosen response, which is added to the loss:
    it holds up the likelihood of chosen responses, which preference losses let fall. 0: off, as published."""


@dataclass(frozen=True)
class LMPOConfig(PreferenceOptions):
    """Options of LMPO; the defaults are the paper's for Llama-3-Instruct 8B (Table 5).

    Options that default to None belong to one choice of another option and are an error where that choice is not
    made, so that a setting without effect cannot go unnoticed.
    """

    name: str = "lmpo"
    beta: float = setting(2.5, above=0)
    """Scale of the implicit reward ``beta * S / n`` (Eq. 5)."""
    h: float | None = setting(None, above=0)
    """Home advantage (Eq. 10), greater than 0; 1 turns it off. Give this or ``log_h``."""
    log_h: float | None = None
    """``ln h``; 0 turns the home advantage off. Neither given: 1.4."""
    lam: float = setting(0.2, minimum=0)
    """``lambda``, weight of the normalised margin (Eq. 11)."""
    compat: Literal["paper", "released_code"] = "paper"
    """`paper`: the equations as printed. `released_code`: what the authors' trainer does (margin halved and
    without gradient, statistics from zero without bias correction, updated before use by every micro-batch of
    ``group_size`` pairs, in evaluation too)."""
    margin: Literal["power5", "log", "cube", "sigmoid"] = "power5"
    """Margin function: `power5` (Eq. 7), `log`, `cube` or `sigmoid` (Section 4.2)."""
    alpha: float | None = setting(None, above=0)
    """Constant of `margin: log`; unset: 5, from the authors' trainer (the paper gives none)."""
    beta_s: float | None = setting(None, above=0)
    """Constant of `margin: sigmoid`; unset: 0.1, from the authors' trainer (the paper gives none)."""
    average_length_normalization: bool = True
    """Scale the exponent of ``p`` by ``(n_w + n_l) / (2 n)`` (Eq. 8); off: ``p = exp(S / n)``."""
    detach_margin: bool | None = None
    """Whether the margin is a constant for the gradient; unset: as ``compat`` has it (App. A derives it with)."""
    z_score: bool = True
    """Normalise the margin by running statistics (Eq. 9); off: ``mbar = m``."""
    statistics: Literal["ema", "cumulative"] = "ema"
    """`ema` (Eq. 21-22) or `cumulative` (mean and deviation over all pairs so far, Eq. 9 read literally)."""
    momentum: float | None = setting(None, minimum=0, below=1)
    """Weight of the past in `statistics: ema`; unset: 0.9."""
    group_size: int | None = setting(None, minimum=2, remedy="one pair has no deviation")
    """Pairs of a micro-batch of `compat: released_code`, in the order in which the data comes, however the model's own
    micro-batches are laid; unset: 8 (the authors' 4 GPUs of 2 pairs), and 16 in evaluation (of 4)."""
    std_floor: float | None = setting(None, above=0)
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

    def combinations(self) -> Iterator[str]:
        """Two values of ``h``, and options whose value has no effect."""
        if self.h is not None and self.log_h is not None and abs(math.log(self.h) - self.log_h) > 1e-6:
            yield (
                f"loss.h={self.h} and loss.log_h={self.log_h} disagree, as ln h is {math.log(self.h):.6g}; "
                f"give only one of them, and set the other to null"
            )
        for name, margin in (("alpha", "log"), ("beta_s", "sigmoid")):
            value = getattr(self, name)
            if value is not None and self.margin != margin:
                yield f"loss.{name}={value} has an effect only with loss.margin={margin}; leave it out, or set that"
        if self.group_size is not None and self.compat != "released_code":
            yield (
                f"loss.group_size={self.group_size} has an effect only with loss.compat=released_code; "
                f"leave it out, or set that"
            )
        yield from self._statistics()

    def _statistics(self) -> Iterator[str]:
        if not self.z_score:
            given: dict[str, Any] = {name: getattr(self, name) for name in ("momentum", "group_size", "std_floor")}
            given["statistics"] = None if self.statistics == "ema" else self.statistics
            for name, value in given.items():
                if value is not None:
                    yield f"loss.{name}={value} has an effect only with loss.z_score=true; leave it out, or set that"
        elif self.statistics == "cumulative":
            if self.momentum is not None:
                yield (
                    f"loss.momentum={self.momentum} has an effect only with loss.statistics=ema; "
                    f"leave it out, or set that"
                )
            if self.compat == "released_code":
                yield (
                    "loss.statistics=cumulative does not go with loss.compat=released_code, which keeps moving "
                    "averages; set loss.statistics=ema, or loss.compat=paper"
                )


@dataclass(frozen=True)
class SFTConfig(LossOptions):
    """Options of SFT."""

    takes = ("pairs", "conversations")
    name: str = "sft"
    nll: Literal["mean", "token_mean", "sum"] | None = None
    """How the likelihood is taken: `token_mean` over all predicted tokens of the global batch, as TRL and other SFT
    trainers do; the `mean` of a response, so that all responses weigh the same; or the `sum`. Unset: `token_mean` of
    conversations, `mean` of the chosen responses of pairs."""


@dataclass(frozen=True)
class DPOConfig(PreferenceOptions):
    """Options of DPO."""

    needs_reference = True
    name: str = "dpo"
    beta: float = setting(0.01, above=0)
    """Strength of the pull to the reference. SimPO's README gives 0.01 as the best for DPO in all of its settings.
    With ``average_log_probs`` it counts per token and must be larger: 5 in Tulu 3 (arXiv:2411.15124)."""
    average_log_probs: bool = False
    """Log-ratios per token instead of sums: length-normalized DPO, as in Tulu 3 (TRL's `sigmoid_norm`)."""
    ld_alpha: float | None = setting(None, minimum=0, maximum=1, remedy="unset it for plain DPO")
    """LD-DPO (arXiv:2409.06411): weight of a response's tokens beyond the length of the shorter response, 0 to 1.
    1 or unset: plain DPO; 0: only the common length counts."""


@dataclass(frozen=True)
class RDPOConfig(PreferenceOptions):
    """Options of R-DPO."""

    needs_reference = True
    name: str = "rdpo"
    beta: float = setting(0.01, above=0)
    """Strength of the pull to the reference. SimPO's appendix searches 0.01, 0.05, 0.1 and names no winner."""
    alpha: float = 0.05
    """What a token of length explains of the preference: pairs with a longer chosen response push less, pairs with
    a shorter one more. SimPO's appendix searches 0.05, 0.1, 0.5, 1.0 and names no winner."""


@dataclass(frozen=True)
class IPOConfig(PreferenceOptions):
    """Options of IPO."""

    needs_reference = True
    name: str = "ipo"
    tau: float = setting(0.1, above=0)
    """Regularisation: the log-ratio difference is drawn to ``1 / (2 tau)``. SimPO's appendix searches 0.01, 0.1,
    0.5, 1.0 and names no winner; 0.1 is the middle of it and the common default elsewhere."""
    average_log_probs: bool = True
    """Log-ratios per token instead of sums. With sums the squared loss grows with length; IPO's authors confirmed to
    TRL's that their results are per token, and SimPO's rows are trained so."""


@dataclass(frozen=True)
class RRHFConfig(PreferenceOptions):
    """Options of RRHF."""

    name: str = "rrhf"
    lam: float = setting(1.0, minimum=0)
    """``lambda``, weight of the likelihood of the chosen response; 1 in RRHF's own loss. SimPO's appendix searches
    0.1, 0.5, 1.0, 10.0 and names no winner."""
    nll: Literal["mean", "token_mean", "sum"] = "sum"
    """How that likelihood is taken: `sum` over the response as SimPO's appendix prints it, its `mean`, or
    `token_mean` over all chosen tokens of the global batch."""


@dataclass(frozen=True)
class SLiCConfig(PreferenceOptions):
    """Options of SLiC-HF."""

    name: str = "slic"
    delta: float = setting(1.0, above=0)
    """Wanted distance of the two log-probabilities, in nats. SimPO's appendix searches 0.5, 1.0, 2.0, 10.0
    and names no winner."""
    lam: float = setting(0.1, minimum=0)
    """``lambda``, weight of the likelihood of the chosen response. SimPO's appendix searches 0.1, 0.5, 1.0, 10.0 and
    names no winner."""
    nll: Literal["mean", "token_mean", "sum"] = "sum"
    """How that likelihood is taken: `sum` over the response as SimPO's appendix prints it, its `mean`, or
    `token_mean` over all chosen tokens of the global batch."""


@dataclass(frozen=True)
class CPOConfig(PreferenceOptions):
    """Options of CPO."""

    name: str = "cpo"
    beta: float = setting(0.01, above=0)
    """Scale of the compared log-probabilities. SimPO's appendix searches 0.01, 0.05, 0.1 and names no winner."""
    lam: float = setting(1.0, minimum=0)
    """``lambda``, weight of the likelihood of the chosen response; 1.0 in SimPO's appendix and in the CPO author's own
    trainer (TRL's, pull request 1382)."""
    nll: Literal["mean", "token_mean", "sum"] = setting("mean", absent_means="sum")
    """How that likelihood is taken. `mean` per token of the response, for which 0.01 and 1.0 are published: the CPO
    author's trainer does so (with one pair per micro-batch; with more it is `token_mean`, over all chosen tokens of
    the batch). `sum` is what the CPO and SimPO papers print; the preference is then about 1 % of the gradient."""


@dataclass(frozen=True)
class KTOConfig(PreferenceOptions):
    """Options of KTO."""

    needs_reference = True
    takes = ("pairs", "labels")
    name: str = "kto"
    beta: float = setting(0.01, above=0)
    """Scale of the log-ratios. SimPO's appendix searches 0.01, 0.05, 0.1 and names no winner."""
    desirable_weight: float = setting(1.0, above=0)
    """Weight of chosen responses and of answers with the label true (``lambda_D``); 1.0 in SimPO's appendix."""
    undesirable_weight: float = setting(1.0, above=0)
    """Weight of rejected responses and of answers with the label false (``lambda_U``); 1.0 in SimPO's appendix."""
    reference_point: Literal["kl", "zero"] = "kl"
    """What rewards are compared with: `kl`, KTO's estimate of the KL divergence from the reference model; or `zero`,
    which is APO-zero for single answers (TRL's `apo_zero_unpaired`) and takes no forward pass for an estimate."""


@dataclass(frozen=True)
class ORPOConfig(PreferenceOptions):
    """Options of ORPO."""

    name: str = "orpo"
    lam: float = setting(0.1, above=0)
    """``lambda``, weight of the odds-ratio term; 0.1 is ORPO's own value for Mistral 7B. SimPO's
    appendix searches 0.1, 0.5, 1.0, 2.0 and names no winner."""


@dataclass(frozen=True)
class SimPOConfig(PreferenceOptions):
    """Options of SimPO; the defaults are its Llama-3-Instruct setting.

    SimPO's README gives ``beta`` and the ratio ``gamma / beta`` per setting: Mistral-Base 2.0 and 0.8 (gamma 1.6),
    Mistral-Instruct 2.5 and 0.1 (0.25), Llama-3-Base 2.0 and 0.5 (1.0), Llama-3-Instruct 2.5 and 0.55 (1.375),
    Llama-3-Instruct v0.2 (pairs ranked by ArmoRM) 10 and 0.3 (3.0), Gemma 10 and 0.5 (5.0). It advises an additional
    ``sft_weight`` where likelihoods fall (its section on an extra SFT loss).
    """

    name: str = "simpo"
    beta: float = setting(2.5, above=0)
    """Scale of the implicit reward ``beta S / n``."""
    gamma: float = setting(1.375, minimum=0)
    """Target reward margin, absolute: not the ratio ``gamma / beta`` of SimPO's own configuration files."""


OPTIONS: dict[str, type[LossOptions]] = {
    of.name: of
    for of in (
        LMPOConfig,
        SFTConfig,
        DPOConfig,
        RDPOConfig,
        IPOConfig,
        RRHFConfig,
        SLiCConfig,
        CPOConfig,
        KTOConfig,
        ORPOConfig,
        SimPOConfig,
    )
}
"""Every loss by name; a new one is a line here."""
