"""A recipe's ``loss`` section as the options of the loss that it names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from nemo_lmpo.config.coerce import REFUSED, as_far_as_known, collect, raise_all
from nemo_lmpo.config.unknown_keys import about_unknown_key
from nemo_lmpo.errors import did_you_mean, shown
from nemo_lmpo.loss.options import DEFAULT_LOSS, LossOptions
from nemo_lmpo.loss.packages import find_options, loss_names


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
    known = loss_names()
    if not isinstance(name, str) or name not in known:
        hint = did_you_mean(str(name), known, before="loss.name=")
        problems.append(f"loss.name={shown(name)} is unknown{hint} Known: {', '.join(known)}")
        return REFUSED
    options = {str(option): value for option, value in raw.items() if option != "name"}
    config: LossOptions = collect(
        find_options(name),
        options,
        prefix="loss.",
        unknown=partial(about_unknown_key, loss=name),
        problems=problems,
    )
    problems.extend(as_far_as_known(config.combinations()))
    return config


def loss_name(raw: Any) -> str:
    """The loss that a section names; the default one where it names none that is known."""
    name = raw.get("name") if isinstance(raw, Mapping) else None
    return name if isinstance(name, str) and name in loss_names() else DEFAULT_LOSS
