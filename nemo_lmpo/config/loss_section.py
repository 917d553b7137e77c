"""A recipe's ``loss`` section as the options of the loss that it names."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from nemo_lmpo.config.coerce import REFUSED, as_far_as_known, collect, raise_all
from nemo_lmpo.errors import shown
from nemo_lmpo.loss.options import DEFAULT_LOSS, OPTIONS, LossOptions

_ALIASES = {"lambda": "lam", "lambda_": "lam", "gamma_beta_ratio": "gamma", "label": "name", "type": "name"}
"""Names that people know from elsewhere, for the suggestion in an error."""


def parse_loss(raw: Mapping[str, Any] | None) -> Any:
    """A ``loss`` section as the validated dataclass of the loss it names.

    Args:
        raw: ``name`` and options; without ``name`` it is LMPO.

    Raises:
        ConfigError: with every problem, one a line: an unknown loss, an option that this loss does not have, a wrong
            type, a value out of bounds, or options that do not go together.
    """
    problems: list[str] = []
    config = collect_loss(raw, problems)
    raise_all(problems)
    return config


def collect_loss(raw: Mapping[str, Any] | None, problems: list[str]) -> Any:
    """As :func:`parse_loss`, but problems are appended, and :data:`REFUSED` stands for what has one."""
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        problems.append(f"loss={shown(raw)} is not a group of settings; give for example loss.name=lmpo")
        return REFUSED
    given = raw.get("name")
    name = DEFAULT_LOSS if given is None else given
    if not isinstance(name, str) or name not in OPTIONS:
        hint = _did_you_mean("loss.name=", str(name), OPTIONS)
        problems.append(f"loss.name={shown(name)} is unknown{hint} Known: {', '.join(OPTIONS)}")
        return REFUSED
    options = {str(option): value for option, value in raw.items() if option != "name"}
    config: LossOptions = collect(
        OPTIONS[name],
        options,
        prefix="loss.",
        unknown=lambda key, value: _unknown_option(key, value, name),
        problems=problems,
    )
    problems.extend(as_far_as_known(config.combinations()))
    return config


def _options_of(name: str) -> list[str]:
    return [field.name for field in dataclasses.fields(OPTIONS[name]) if field.name != "name"]


def _did_you_mean(prefix: str, given: str, known: Iterable[str]) -> str:
    names = list(known)
    alias = _ALIASES.get(given)
    near = [alias] if alias in names else difflib.get_close_matches(given, names, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else "."


def _unknown_option(key: str, value: Any, name: str) -> str:
    option = key.removeprefix("loss.")
    own = _options_of(name)
    users = [other for other in OPTIONS if option in _options_of(other)]
    options = f"Options of {name}: {', '.join(own) or 'none'}"
    if users:
        return (
            f"{key}={shown(value)}: loss.name={name} does not use it ({', '.join(users)} would); remove it, or change "
            f"loss.name. {options}"
        )
    return f"unknown key {key}{_did_you_mean('loss.', option, own)} {options}"
