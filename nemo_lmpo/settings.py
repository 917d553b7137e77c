"""A setting: a dataclass field that states its default and what its values may be, and the check of values against it.

The configuration (:mod:`nemo_lmpo.config.schema`), the options of losses (:mod:`nemo_lmpo.loss.options`) and of answers
(:mod:`nemo_lmpo.answers.sampling`) are made of these. This module imports nothing but the errors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nemo_lmpo.errors import shown

LARGEST_WHOLE_NUMBER = 2**63 - 1
LARGEST_NUMBER = 1e6
"""Of fractional numbers without a maximum of their own; they are of the order of 0.01 to 100, and far beyond, a loss is
finite and means nothing."""
LONGEST_TEXT = 4096
"""Characters of a text: the longest path that Linux takes."""


@dataclass(frozen=True)
class Limits:
    """What the values of a field may be, beyond its type."""

    minimum: float | None = None
    above: float | None = None
    below: float | None = None
    maximum: float | None = None
    remedy: str = ""
    """What to do instead, put behind the message."""
    may_be_empty: bool = False
    """Whether an empty text means something."""


def setting(
    default: Any = dataclasses.MISSING,
    *,
    may_change: bool = False,
    switch: bool = False,
    absent_means: Any = dataclasses.MISSING,
    **limits: Any,
) -> Any:
    """A field with its default and what holds for its values.

    Args:
        default: the default; a list or a dataclass type is made anew for every configuration.
        may_change: a resumed run may have another value than before: it changes cost, length or display, not what is
            learned from which pairs. Of a group: all of its settings.
        switch: its group is off while this is unset, so the group's other settings have no effect then.
        absent_means: the value of a run of an earlier version that does not have the field, where not the default.
        limits: of :class:`Limits`.
    """
    metadata: dict[str, Any] = {"may_change": may_change, "switch": switch, "limits": Limits(**limits)}
    if absent_means is not dataclasses.MISSING:
        metadata["absent_means"] = absent_means
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def limits_of(of: dataclasses.Field[Any]) -> Limits:
    """What holds for the values of a field; every field has some."""
    limits: Limits = of.metadata.get("limits", Limits())
    return limits


def all_out_of_bounds(group: Any, prefix: str = "") -> Iterator[str]:
    """A sentence for every value of a dataclass, and of those in it, that its field does not allow."""
    for of in dataclasses.fields(group):
        key, value = prefix + of.name, getattr(group, of.name)
        if dataclasses.is_dataclass(value):
            yield from all_out_of_bounds(value, f"{key}.")
        else:
            problem = out_of_bounds(key, value, limits_of(of))
            if problem is not None:
                yield problem


def out_of_bounds(key: str, value: Any, limits: Limits) -> str | None:
    """A sentence about a value, or an item of a list, that is not allowed; None where all is well."""
    wrong = _wrong(value, limits)
    return None if wrong is None else f"{key}={shown(value)} {wrong}"


def options_out_of_bounds(options: Any) -> Iterator[str]:
    """As :func:`all_out_of_bounds`, for a dataclass of a command's options: `--top-p 2.0 must be ...`."""
    for of in dataclasses.fields(options):
        value = getattr(options, of.name)
        wrong = _wrong(value, limits_of(of))
        if wrong is not None:
            yield f"--{of.name.replace('_', '-')} {shown(value)} {wrong}"


def _wrong(value: Any, limits: Limits) -> str | None:
    for item in value if isinstance(value, list) else [value]:
        wrong = _text(item, limits) if isinstance(item, str) else _number(item, limits)
        if wrong is not None:
            return wrong
    return None


def _text(text: str, limits: Limits) -> str | None:
    if not text.strip() and not limits.may_be_empty:
        return "must not be empty; set it to null to leave it out"
    if any(ord(letter) < 32 and letter not in "\t\n" for letter in text) or not _is_unicode(text):
        return "contains control characters; write plain text"
    if len(text) > LONGEST_TEXT:
        return f"has {len(text)} characters; give at most {LONGEST_TEXT}"
    return None


def _is_unicode(text: str) -> bool:
    """Half surrogates stand for bytes of the command line that are not UTF-8; a file name may hold them."""
    return not any(0xD800 <= ord(letter) < 0xDC80 or 0xDCFF < ord(letter) <= 0xDFFF for letter in text)


def _number(value: Any, limits: Limits) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    within = (
        (limits.minimum is None or value >= limits.minimum)
        and (limits.above is None or value > limits.above)
        and (limits.below is None or value < limits.below)
        and (limits.maximum is None or value <= limits.maximum)
    )
    if not within:
        return f"must be {_range(limits)}" + (f"; {limits.remedy}" if limits.remedy else "")
    if isinstance(value, int) and abs(value) > LARGEST_WHOLE_NUMBER:
        return f"must be at most {LARGEST_WHOLE_NUMBER} in size"
    has_both = limits.maximum is not None and (limits.minimum is not None or limits.above is not None)
    if isinstance(value, float) and not has_both and abs(value) > LARGEST_NUMBER:
        return f"must be at most {_plain(LARGEST_NUMBER)} in size"
    return None


def _range(limits: Limits) -> str:
    """`at least 0 and less than 1`."""
    bounds = (
        ("at least", limits.minimum),
        ("greater than", limits.above),
        ("less than", limits.below),
        ("at most", limits.maximum),
    )
    return " and ".join(f"{words} {_plain(bound)}" for words, bound in bounds if bound is not None)


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"
