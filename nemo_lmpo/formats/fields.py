"""Plain values of a file that somebody else wrote: each is read with its field, value and remedy in the error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from nemo_lmpo.errors import CheckpointError, shown

LARGEST_SIZE = 2**31 - 1
"""No tensor library counts further in one dimension."""


class Fields:
    """Named values, for example of a `config.json`; ``origin`` is what errors call the file.

    Args:
        values: what the file holds.
        origin: the file.
        text_numbers: YAML reads `1e-5` as text; take such text for the number that it is.

    Raises:
        CheckpointError: ``values`` have no names; so does every method for an invalid value.
    """

    def __init__(self, values: object, origin: str, *, text_numbers: bool = False) -> None:
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{origin} holds a {type(values).__name__} instead of named fields; restore the file")
        self.values: Mapping[str, Any] = values
        self.origin = origin
        self._text_numbers = text_numbers

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def size(
        self,
        name: str,
        *,
        absent: int | None = None,
        null: int | None = None,
        least: int = 1,
        most: int = LARGEST_SIZE,
    ) -> int:
        """A whole number; ``absent`` and ``null`` stand in for a field that is not there, or is null."""
        value = self.values.get(name, _MISSING)
        if value is _MISSING:
            if absent is None:
                raise CheckpointError(f"{self.origin}: the field {name} is missing; add it")
            return absent
        if value is None and null is not None:
            return null
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(name, f"is not a whole number of at least {least}; correct it")
        if value > most:
            raise self.error(name, f"is more than {most}, the most that is supported; correct it")
        return value

    def number(self, name: str, absent: float | None = None, *, zero: bool = False) -> float:
        """A finite number above 0, or ``zero`` itself if that is allowed."""
        value = self.values.get(name, absent)
        if value is None and name not in self.values:
            raise CheckpointError(f"{self.origin}: the field {name} is missing; add it")
        if self._text_numbers and isinstance(value, str):
            with suppress(ValueError):
                value = float(value)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf or (value == 0 and not zero):
            raise self.error(name, f"is not a number {'of at least' if zero else 'above'} 0; correct it")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false; false if it is not there or null."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(name, "is neither true nor false; correct it")
        return bool(value)

    def require(self, allowed: Mapping[str, tuple[Any, ...]], what: str) -> None:
        """Refuse a field that is there with none of its ``allowed`` values; ``what`` says who has those."""
        for name, values in allowed.items():
            if name in self.values and not any(_same(self.values[name], value) for value in values):
                raise self.error(name, f"is not supported (only {values[0]!r}: {what})")

    def error(self, name: str, problem: str) -> CheckpointError:
        """The error that says what is wrong with a field's value."""
        return CheckpointError(f"{self.origin}: {name}={shown(self.values.get(name))} {problem}")


_MISSING = object()


def _same(value: object, allowed: object) -> bool:
    """Equal, where a number is not a truth value."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)
