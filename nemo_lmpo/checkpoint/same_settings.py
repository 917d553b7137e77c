"""Whether a run that goes on has the settings that it was begun with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nemo_lmpo.config.schema import Config, may_change


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested settings."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def default_settings(config: Config) -> dict[str, Any]:
    """What a setting is worth where a run of an earlier version does not have it: mostly its default.

    A field whose default changes what earlier versions did says so by its metadata ``absent_means``.
    """
    values = dict(flatten(dataclasses.asdict(dataclasses.replace(Config(), loss=type(config.loss)()))))
    for of in dataclasses.fields(config.loss):
        if "absent_means" in of.metadata:
            values[f"loss.{of.name}"] = of.metadata["absent_means"]
    return values


def changed_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Settings that a resumed run must have as before and has not: old and new value by dotted key.

    Settings that came later count as what they are worth without being set, and settings that are gone do not count.
    """
    changes = {}
    for key in sorted(before.keys() | now.keys()):
        if key not in now and key not in defaults and not key.startswith("model.architecture."):
            continue
        old, new = before.get(key, defaults.get(key)), now.get(key, defaults.get(key))
        if old != new and not may_change(key):
            changes[key] = (old, new)
    return changes


def is_admitted(key: str, allowed: Iterable[str]) -> bool:
    """Whether `checkpoint.allow_changes` names a setting or a group that it belongs to."""
    return any(key == name or key.startswith(f"{name}.") for name in allowed)
