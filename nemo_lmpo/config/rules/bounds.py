"""What a single number or text may be: limits of :func:`nemo_lmpo.config.schema.setting`, and those of every field."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from nemo_lmpo.config.schema import Limits
from nemo_lmpo.errors import shown

LARGEST_WHOLE_NUMBER = 2**63 - 1
LARGEST_NUMBER = 1e6
"""Of fractional numbers without a limit of their own; they are of the order of 0.01 to 100, and far beyond, a loss is
finite and means nothing."""
LONGEST_TEXT = 4096
"""Letters of a text: the longest path that Linux takes."""
LONGEST_NAME = 255
"""Bytes of a file's name."""


def out_of_bounds(group: Any, prefix: str = "") -> Iterator[str]:
    """Numbers and texts of a configuration that no run could use."""
    for of in dataclasses.fields(group):
        key, value = prefix + of.name, getattr(group, of.name)
        if dataclasses.is_dataclass(value):
            yield from out_of_bounds(value, f"{key}.")
        else:
            yield from _of_value(key, value, of.metadata.get("limits", Limits()))


def _of_value(key: str, value: Any, limits: Limits) -> Iterator[str]:
    items = value if isinstance(value, list) else [value]
    for item in items:
        wrong = _text(item, limits) if isinstance(item, str) else _number(item, limits)
        if wrong:
            yield f"{key}={shown(value)} {wrong}" if isinstance(item, str) else f"{key}={value} {wrong}"
            return


def _text(text: str, limits: Limits) -> str | None:
    if not text.strip() and not limits.may_be_empty:
        return "must not be empty; set it to null to leave it out"
    if any(ord(letter) < 32 and letter not in "\t\n" for letter in text) or not _is_unicode(text):
        return "holds control characters; write plain text"
    if len(text) > LONGEST_TEXT:
        return f"has {len(text)} letters; give at most {LONGEST_TEXT}"
    return None


def _is_unicode(text: str) -> bool:
    """Half surrogates stand for bytes of the command line that are no UTF-8; a file name may hold them."""
    return not any(0xD800 <= ord(letter) < 0xDC80 or 0xDCFF < ord(letter) <= 0xDFFF for letter in text)


def _number(value: Any, limits: Limits) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not math.isfinite(value) if isinstance(value, float) else abs(value) > LARGEST_WHOLE_NUMBER:
        return "must be a finite number" if isinstance(value, float) else "is too large; correct it"
    remedy = f"; {limits.remedy}" if limits.remedy else ""
    if limits.minimum is not None and value < limits.minimum:
        bound = f"at least {limits.minimum:g}" if limits.minimum else ""
        return (f"must be {bound}" if bound else "must not be negative") + remedy
    if limits.above is not None and value <= limits.above:
        return f"must be above {limits.above:g}{remedy}"
    if limits.below is not None and value >= limits.below:
        return f"must be below {limits.below:g}{remedy}"
    largest = LARGEST_NUMBER if isinstance(value, float) and limits.maximum is None else limits.maximum
    if largest is not None and (value > largest or (limits.minimum is None and value < -largest)):
        return f"must be at most {largest:.0f} in size{remedy}"
    return None
