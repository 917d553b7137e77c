"""The losses by name, and how a recipe's ``loss`` section becomes a configured loss."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nemo_lmpo.errors import ConfigError
from nemo_lmpo.loss.cpo import CPOConfig, cpo_loss
from nemo_lmpo.loss.dpo import DPOConfig, dpo_loss
from nemo_lmpo.loss.interface import LossInputs, LossOutputs, PreferenceLoss, StatisticsConfig
from nemo_lmpo.loss.ipo import IPOConfig, ipo_loss
from nemo_lmpo.loss.kto import KTOConfig, kto_loss, kto_observe, kto_statistics
from nemo_lmpo.loss.lmpo import LMPOConfig, lmpo_loss, lmpo_observe, lmpo_statistics
from nemo_lmpo.loss.orpo import ORPOConfig, orpo_loss
from nemo_lmpo.loss.sft import SFTConfig, sft_loss
from nemo_lmpo.loss.simpo import SimPOConfig, simpo_loss
from nemo_lmpo.loss.slic import SLiCConfig, slic_loss

DEFAULT_LOSS = "lmpo"

_ALIASES = {"lambda": "lam", "lambda_": "lam", "gamma_beta_ratio": "gamma", "label": "name", "type": "name"}
"""Names that people know from elsewhere, for the suggestion in an error."""


@dataclass(frozen=True)
class LossEntry:
    """One loss of the registry."""

    config: type[Any]
    """Its options: a dataclass with ``name`` and ``validate()``."""
    function: Callable[[LossInputs, Any], LossOutputs]
    """Inputs and options to per-pair losses; pure."""
    needs_reference: bool = False
    """Whether it compares with a frozen reference model."""
    statistics: Callable[[Any], StatisticsConfig | None] | None = None
    """Options to the running statistics they ask for."""
    observe: Callable[[LossInputs, Any], Tensor] | None = None
    """Inputs and options to the detached ``[B]`` values that feed the statistics."""


LOSSES: dict[str, LossEntry] = {
    "lmpo": LossEntry(LMPOConfig, lmpo_loss, statistics=lmpo_statistics, observe=lmpo_observe),
    "sft": LossEntry(SFTConfig, sft_loss),
    "dpo": LossEntry(DPOConfig, dpo_loss, needs_reference=True),
    "ipo": LossEntry(IPOConfig, ipo_loss, needs_reference=True),
    "slic": LossEntry(SLiCConfig, slic_loss),
    "cpo": LossEntry(CPOConfig, cpo_loss),
    "kto": LossEntry(KTOConfig, kto_loss, needs_reference=True, statistics=kto_statistics, observe=kto_observe),
    "orpo": LossEntry(ORPOConfig, orpo_loss),
    "simpo": LossEntry(SimPOConfig, simpo_loss),
}
"""Every loss; a new one is a line here."""


@dataclass(frozen=True)
class ConfiguredLoss:
    """A :class:`~nemo_lmpo.loss.interface.PreferenceLoss`: a registry entry with its options."""

    config: Any
    entry: LossEntry
    statistics: StatisticsConfig | None

    @property
    def name(self) -> str:
        """Its name in the registry."""
        return str(self.config.name)

    @property
    def needs_reference(self) -> bool:
        """Whether ``reference_*_logps`` must be given."""
        return self.entry.needs_reference

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """Per-pair losses and metrics."""
        return self.entry.function(inputs, self.config)

    def observe(self, inputs: LossInputs) -> Tensor | None:
        """Detached ``[B]`` values for the running statistics; None where none are kept."""
        if self.statistics is None or self.entry.observe is None:
            return None
        return self.entry.observe(inputs, self.config)


def build_loss(config: Any) -> PreferenceLoss:
    """The callable loss of a dataclass from :func:`parse_loss` (or built directly); validates it.

    Raises:
        ConfigError: The options are wrong, or ``config`` is not one of the registry's dataclasses.
    """
    entry = LOSSES.get(getattr(config, "name", ""))
    if entry is None or not isinstance(config, entry.config):
        raise ConfigError(f"loss={config!r}: not the options of a known loss; use parse_loss on a mapping first.")
    config.validate()
    statistics = entry.statistics(config) if entry.statistics is not None else None
    return ConfiguredLoss(config, entry, statistics)


def parse_loss(raw: Mapping[str, Any] | None) -> Any:
    """A recipe's ``loss`` section as the validated dataclass of the loss it names.

    Args:
        raw: ``name`` and options; without ``name`` it is LMPO. Numbers may be given as strings (YAML reads
            ``1e-3`` as one).

    Raises:
        ConfigError: Unknown loss, an option that this loss does not have, a wrong type, or a wrong value.
    """
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        raise ConfigError(f"loss={raw!r}: must be a mapping, for example loss.name=lmpo loss.beta=2.5.")
    name = raw.get("name")
    name = DEFAULT_LOSS if name is None else name
    if not isinstance(name, str) or name not in LOSSES:
        near = _nearest(str(name), LOSSES)
        raise ConfigError(f"loss.name={name!r}: unknown loss{near}. Known: {', '.join(LOSSES)}.")
    config_type = LOSSES[name].config
    hints = typing.get_type_hints(config_type)
    options: dict[str, Any] = {}
    for option, value in raw.items():
        if option == "name":
            continue
        if option not in hints:
            raise _unknown_option(str(option), value, name)
        options[option] = _convert(option, value, hints[option])
    config = config_type(**options)
    config.validate()
    return config


def _options_of(name: str) -> list[str]:
    return [field.name for field in dataclasses.fields(LOSSES[name].config) if field.name != "name"]


def _nearest(given: str, known: Any) -> str:
    names = list(known)
    alias = _ALIASES.get(given)
    near = [alias] if alias in names else difflib.get_close_matches(given, names, n=1)
    return f" (nearest: {near[0]})" if near else ""


def _unknown_option(option: str, value: Any, name: str) -> ConfigError:
    own = _options_of(name)
    users = [other for other in LOSSES if option in _options_of(other)]
    if users:
        reason = f"loss.name={name} does not use it ({', '.join(users)} would). Remove it, or change loss.name"
    else:
        reason = f"unknown option{_nearest(option, own)}"
    return ConfigError(f"loss.{option}={value!r}: {reason}. Options of {name}: {', '.join(own) or 'none'}.")


_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _convert(option: str, value: Any, hint: Any) -> Any:
    """``value`` as the type of the option's field, or a ConfigError that names it."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return None
    if bool in allowed:
        word = _WORDS.get(value.lower()) if isinstance(value, str) else value
        if isinstance(word, bool):
            return word
        raise ConfigError(f"loss.{option}={value!r}: must be true or false.")
    if float in allowed:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                return float(value)
            except (ValueError, OverflowError):
                pass
        raise ConfigError(f"loss.{option}={value!r}: must be a number.")
    if isinstance(value, str):
        return value
    raise ConfigError(f"loss.{option}={value!r}: must be text.")
