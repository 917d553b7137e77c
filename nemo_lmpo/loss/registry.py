"""The losses by name, and a loss together with its options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nemo_lmpo.errors import ConfigError
from nemo_lmpo.loss.cpo import cpo_loss
from nemo_lmpo.loss.dpo import dpo_loss, dpo_needs_shared
from nemo_lmpo.loss.interface import (
    LossInputs,
    LossOutputs,
    ResponseInputs,
    ResponseOutputs,
    StatisticsConfig,
)
from nemo_lmpo.loss.ipo import ipo_loss
from nemo_lmpo.loss.kto import (
    kto_loss,
    kto_loss_of_responses,
    kto_observe,
    kto_observe_responses,
    kto_statistics,
)
from nemo_lmpo.loss.lmpo import lmpo_loss, lmpo_observe, lmpo_statistics
from nemo_lmpo.loss.numerics import chosen_nll, nll
from nemo_lmpo.loss.options import (
    CPOConfig,
    DPOConfig,
    IPOConfig,
    KTOConfig,
    LMPOConfig,
    LossOptions,
    ORPOConfig,
    RDPOConfig,
    RRHFConfig,
    SFTConfig,
    SimPOConfig,
    SLiCConfig,
)
from nemo_lmpo.loss.orpo import orpo_loss
from nemo_lmpo.loss.packages import find_package_loss, package_losses
from nemo_lmpo.loss.rdpo import rdpo_loss
from nemo_lmpo.loss.rrhf import rrhf_loss
from nemo_lmpo.loss.sft import sft_loss, sft_loss_of_responses
from nemo_lmpo.loss.simpo import simpo_loss
from nemo_lmpo.loss.slic import slic_loss


@dataclass(frozen=True)
class LossEntry:
    """One loss of the registry."""

    config: type[LossOptions]
    """Its options: a dataclass of :mod:`nemo_lmpo.loss.options`."""
    function: Callable[[LossInputs, Any], LossOutputs]
    """Inputs and options to per-pair losses; pure."""
    of_responses: Callable[[ResponseInputs, Any], ResponseOutputs] | None = None
    """The same of examples with one response; None: the loss is one of pairs only."""
    mean_over_tokens: Callable[[Any], bool] = lambda config: False
    """Options to whether the mean over such examples is one over all their predicted tokens."""
    needs_shared_logps: Callable[[Any], bool] = lambda config: False
    """Options to whether it wants the log-probabilities of the two responses' common length, too."""
    statistics: Callable[[Any], StatisticsConfig | None] = lambda config: None
    """Options to the running statistics they ask for."""
    observe: Callable[[LossInputs, Any], Tensor] | None = None
    """Inputs and options to the ``[B]`` values that feed the statistics."""
    observe_responses: Callable[[ResponseInputs, Any], Tensor] | None = None
    """The same of examples with one response."""

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with a frozen reference model."""
        return self.config.needs_reference


LOSSES: dict[str, LossEntry] = {
    "lmpo": LossEntry(LMPOConfig, lmpo_loss, statistics=lmpo_statistics, observe=lmpo_observe),
    "sft": LossEntry(
        SFTConfig, sft_loss, sft_loss_of_responses, mean_over_tokens=lambda config: config.nll in (None, "token_mean")
    ),
    "dpo": LossEntry(DPOConfig, dpo_loss, needs_shared_logps=dpo_needs_shared),
    "rdpo": LossEntry(RDPOConfig, rdpo_loss),
    "ipo": LossEntry(IPOConfig, ipo_loss),
    "rrhf": LossEntry(RRHFConfig, rrhf_loss),
    "slic": LossEntry(SLiCConfig, slic_loss),
    "cpo": LossEntry(CPOConfig, cpo_loss),
    "kto": LossEntry(
        KTOConfig,
        kto_loss,
        kto_loss_of_responses,
        statistics=kto_statistics,
        observe=kto_observe,
        observe_responses=kto_observe_responses,
    ),
    "orpo": LossEntry(ORPOConfig, orpo_loss),
    "simpo": LossEntry(SimPOConfig, simpo_loss),
}
"""Every loss, in the order of :data:`nemo_lmpo.loss.options.OPTIONS`; a new one is a line here, or comes
with a package (:mod:`nemo_lmpo.loss.packages`)."""


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss of the registry with its options."""

    config: Any
    entry: LossEntry
    statistics: StatisticsConfig | None
    """The running statistics that the caller must keep for it, or None."""

    @property
    def name(self) -> str:
        """Its name in the registry."""
        return str(self.config.name)

    @property
    def needs_reference(self) -> bool:
        """Whether ``reference_*_logps`` must be given."""
        return self.entry.needs_reference

    @property
    def needs_shared_logps(self) -> bool:
        """Whether ``*_shared_logps`` must be given, and those of the reference where it needs one."""
        return self.entry.needs_shared_logps(self.config)

    @property
    def needs_mismatched(self) -> bool:
        """Whether it wants values of prompts with answers of other examples, where answers come one by one."""
        return self.statistics is not None and self.entry.observe_responses is not None

    @property
    def mean_over_tokens(self) -> bool:
        """Whether single responses weigh as much as they have predicted tokens."""
        return self.entry.mean_over_tokens(self.config)

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """Per-pair losses, with gradient, and what is only looked at, without."""
        found = self.entry.function(inputs, self.config)
        sft_weight = getattr(self.config, "sft_weight", 0.0)
        return LossOutputs(
            found.losses + sft_weight * chosen_nll(inputs, "mean") if sft_weight else found.losses,
            found.chosen_rewards.detach(),
            found.rejected_rewards.detach(),
            {name: values.detach() for name, values in found.metrics.items()},
        )

    def of_responses(self, inputs: ResponseInputs) -> ResponseOutputs:
        """Losses of examples with one response, with gradient, and what is only looked at, without.

        Raises:
            ConfigError: the loss is one of pairs.
        """
        if self.entry.of_responses is None:
            raise ConfigError(f"loss={self.name} trains on pairs, and the data holds single responses; give pairs")
        found = self.entry.of_responses(inputs, self.config)
        losses, sft_weight = found.losses, getattr(self.config, "sft_weight", 0.0)
        if sft_weight:
            learnt = nll(inputs.logps, inputs.lengths, inputs.mean_length, "mean")
            held_up = learnt if inputs.desirable is None else learnt * inputs.desirable
            losses = losses + sft_weight * held_up
        return ResponseOutputs(
            losses,
            {name: values.detach() for name, values in found.metrics.items()},
            None if found.rewards is None else found.rewards.detach(),
        )

    def observe(self, inputs: LossInputs) -> Tensor | None:
        """Detached ``[B]`` values that feed the running statistics; None where none are kept."""
        if self.statistics is None or self.entry.observe is None:
            return None
        return self.entry.observe(inputs, self.config).detach()

    def observe_responses(self, inputs: ResponseInputs) -> Tensor | None:
        """:meth:`observe` of examples with one response."""
        if self.statistics is None or self.entry.observe_responses is None:
            return None
        return self.entry.observe_responses(inputs, self.config).detach()


def build_loss(config: Any) -> PreferenceLoss:
    """The callable loss of a dataclass of the registry; validates it.

    Raises:
        ConfigError: The options are wrong, or ``config`` is not one of the registry's dataclasses.
    """
    name = getattr(config, "name", "")
    entry = find_package_loss(name) if name in package_losses() else LOSSES.get(name)
    if entry is None or not isinstance(config, entry.config):
        raise ConfigError(f"loss={config!r}: not the options of a known loss; parse a mapping first.")
    config.validate()
    return PreferenceLoss(config, entry, entry.statistics(config))
