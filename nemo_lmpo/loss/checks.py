"""Checks of loss options; every message names the field, its value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Collection

from nemo_lmpo.errors import ConfigError, shown


def check_name(given: str, expected: str) -> None:
    """The name of a loss's options is fixed: another one would be another loss's options."""
    if given != expected:
        raise ConfigError(f"loss.name={given!r}: these are the options of {expected!r}; leave the name unset.")


def check_finite(field: str, value: float) -> None:
    """``value`` is a number, neither infinite nor NaN."""
    if not math.isfinite(value):
        raise ConfigError(f"loss.{field}={value!r}: must be a finite number.")


def check_positive(field: str, value: float) -> None:
    """``value > 0``."""
    check_finite(field, value)
    if value <= 0:
        raise ConfigError(f"loss.{field}={value!r}: must be greater than 0.")


def check_non_negative(field: str, value: float) -> None:
    """``value >= 0``."""
    check_finite(field, value)
    if value < 0:
        raise ConfigError(f"loss.{field}={value!r}: must be 0 or greater.")


def check_choice(field: str, value: str, choices: Collection[str]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigError(f"loss.{field}={shown(value)}: choose one of {', '.join(choices)}.")
