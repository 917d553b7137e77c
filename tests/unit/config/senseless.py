"""Every field of the configuration and of the losses, and values that make no sense for it."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Any

from nemo_lmpo.config.coerce import alternatives, types_of
from nemo_lmpo.config.schema import Config
from nemo_lmpo.loss.registry import LOSSES

FORGED = "\x1b[31m\r\nerror: forged\u2028error: forged"
VALUES: tuple[Any, ...] = (
    *(-1, 0, -0.5, 1e30, -1e30, 10**30, math.inf, -math.inf, math.nan, True, None),
    *(
        "odd",
        "",
        "   ",
        "a\0b",
        "\ud800",
        FORGED,
        "x" * 5000,
        "1e999",
        [],
        ["odd"],
        [-1, "x"],
        [None],
        {},
        {"odd": 1},
    ),
)
NEVER_NUMBERS = (1e30, -1e30, 10**30, math.inf, -math.inf)
MAY_BE_NEGATIVE = {"loss.log_h", "loss.alpha", "loss.gamma", "loss.gap"}
"""Fractional numbers that make sense below 0."""


def fields(cls: type[Any] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and annotated types of the configuration, without the loss's."""
    for name, annotation in types_of(cls).items():
        if dataclasses.is_dataclass(annotation):
            yield from fields(typing.cast(type, annotation), f"{prefix}{name}.")
        elif prefix + name != "loss":
            yield prefix + name, annotation


def all_fields() -> Iterator[tuple[str, str, Any]]:
    """The loss that is chosen, the key and its type."""
    for key, annotation in fields():
        yield "lmpo", key, annotation
    for loss, entry in LOSSES.items():
        for name, annotation in types_of(entry.config).items():
            yield loss, f"loss.{name}", annotation


def with_value(raw: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of plain settings with one of them changed."""
    changed = group = dict(raw)
    *groups, name = key.split(".")
    for part in groups:
        group[part] = group = dict(group.get(part, {}))
    group[name] = value
    return changed


def _items(options: tuple[Any, ...]) -> Iterator[Any]:
    """The types of what lists hold."""
    for option in options:
        if typing.get_origin(option) is list:
            yield from typing.get_args(option)


def makes_no_sense(key: str, annotation: Any, value: Any) -> bool:
    """Whether a value must be refused, from the type of its field alone."""
    options = alternatives(annotation)
    plain = {typing.get_origin(option) or option for option in options}
    if value is None or isinstance(value, bool):
        return (type(None) if value is None else bool) not in plain
    if isinstance(value, dict):
        return dict not in plain
    if isinstance(value, list):
        return list not in plain or (bool(value) and not any(str in alternatives(item) for item in _items(options)))
    if isinstance(value, str):
        if str not in plain or "\0" in value or len(value) > 4096:
            return True
        return not value.strip() and key != "data.system_prompt"
    if str in plain:
        return False  # a name or path of digits
    numbers = {int, float} & plain
    if not numbers or math.isnan(value) or value in NEVER_NUMBERS:
        return True
    return (value < 0 and key not in MAY_BE_NEGATIVE) or (value != int(value) and float not in plain)
