"""A recipe's ``loss`` section as the options of the loss that it names."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from nemo_lmpo.config.coerce import coerce
from nemo_lmpo.errors import ConfigError, shown
from nemo_lmpo.loss.registry import DEFAULT_LOSS, LOSSES

_ALIASES = {"lambda": "lam", "lambda_": "lam", "gamma_beta_ratio": "gamma", "label": "name", "type": "name"}
"""Names that people know from elsewhere, for the suggestion in an error."""


def parse_loss(raw: Mapping[str, Any] | None) -> Any:
    """A ``loss`` section as the validated dataclass of the loss it names.

    Args:
        raw: ``name`` and options; without ``name`` it is LMPO.

    Raises:
        ConfigError: unknown loss, an option that this loss does not have, a wrong type, or a wrong value.
    """
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        raise ConfigError(f"loss={shown(raw)} is not a group of settings; give for example loss.name=lmpo")
    given = raw.get("name")
    name = DEFAULT_LOSS if given is None else given
    if not isinstance(name, str) or name not in LOSSES:
        hint = _did_you_mean("loss.name=", str(name), LOSSES)
        raise ConfigError(f"loss.name={shown(name)} is unknown{hint} Known: {', '.join(LOSSES)}")
    options = {str(option): value for option, value in raw.items() if option != "name"}
    config = coerce(
        LOSSES[name].config, options, prefix="loss.", unknown=lambda key, value: _unknown_option(key, value, name)
    )
    config.validate()
    return config


def _options_of(name: str) -> list[str]:
    return [field.name for field in dataclasses.fields(LOSSES[name].config) if field.name != "name"]


def _did_you_mean(prefix: str, given: str, known: Iterable[str]) -> str:
    names = list(known)
    alias = _ALIASES.get(given)
    near = [alias] if alias in names else difflib.get_close_matches(given, names, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else "."


def _unknown_option(key: str, value: Any, name: str) -> str:
    option = key.removeprefix("loss.")
    own = _options_of(name)
    users = [other for other in LOSSES if option in _options_of(other)]
    options = f"Options of {name}: {', '.join(own) or 'none'}"
    if users:
        return (
            f"{key}={shown(value)}: loss.name={name} does not use it ({', '.join(users)} would); remove it, or change "
            f"loss.name. {options}"
        )
    return f"unknown key {key}{_did_you_mean('loss.', option, own)} {options}"
