"""Options of losses: what they share, and what each says of the values that it may have."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nemo_lmpo.errors import ConfigError, shown

Limit = tuple[str, Callable[[Any], bool]]
"""What a value must be, for the message, and whether one is."""
FINITE: Limit = ("a finite number", math.isfinite)
POSITIVE: Limit = ("greater than 0", lambda value: value > 0)
NON_NEGATIVE: Limit = ("0 or greater", lambda value: value >= 0)


def option(default: Any, *limits: Limit) -> Any:
    """A field with its default, and what holds for its values besides their type; None is not looked at."""
    return dataclasses.field(default=default, metadata={"must_be": limits})


class LossOptions:
    """The base of every loss's options, a dataclass each."""

    def validate(self) -> None:
        """Check every option by itself; a loss's checks of combinations come on top.

        Raises:
            ConfigError: Naming the option, its value and the remedy.
        """
        choices = _choices(typing.cast(Any, type(self)))
        for of in dataclasses.fields(self):  # type: ignore[arg-type]
            name, value = of.name, getattr(self, of.name)
            if name == "name" and value != of.default:  # another name would be another loss's options
                raise ConfigError(
                    f"loss.name={value!r}: these are the options of {of.default!r}; leave the name unset."
                )
            for must_be, holds in of.metadata.get("must_be", ()):
                if value is not None and not holds(value):
                    raise ConfigError(f"loss.{name}={value!r}: must be {must_be}.")
            if value not in choices.get(name, (value,)):
                raise ConfigError(f"loss.{name}={shown(value)}: choose one of {', '.join(choices[name])}.")


@functools.cache
def _choices(options: Any) -> dict[str, tuple[str, ...]]:
    """What the options of a class that are a choice may be, by name."""
    hints = typing.get_type_hints(options).items()
    return {name: typing.get_args(hint) for name, hint in hints if typing.get_origin(hint) is typing.Literal}


@dataclass(frozen=True)
class PreferenceOptions(LossOptions):
    """The base of a preference loss's options."""

    sft_weight: float = option(0.0, FINITE, NON_NEGATIVE)
    """Weight of ``-S_w / n_w``, the mean negative log-likelihood of the chosen response, which is added to the loss:
    it holds up the likelihood of chosen responses, which preference losses let fall. 0: off, as published."""
