"""Plain values as a dataclass: the one place where what a user wrote becomes typed settings, losses' options included.

Types are those that the fields are annotated with: `bool`, `int`, `float`, `str`, `Literal`, lists, groups (another
dataclass), mappings, `None`, and unions of these. All problems are told at once, one a line.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nemo_lmpo.errors import ConfigError, shown

_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}

UnknownKey = Callable[[str, Any], str]
"""The sentence about a dotted key that a group does not have, and its value."""


def coerce(cls: type[Any], raw: Any, *, prefix: str = "", unknown: UnknownKey) -> Any:
    """An instance of ``cls`` with the values of a mapping.

    Args:
        cls: a dataclass.
        raw: values by name; what is absent keeps its default.
        prefix: what messages put before a name, as `loss.`.
        unknown: says what is wrong with a name that is no field.

    Raises:
        ConfigError: with every unknown name, wrong type and unknown choice, one a line.
    """
    problems: list[str] = []
    value = _group(cls, raw, prefix, unknown, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return value


_TYPES: dict[type[Any], Mapping[str, Any]] = {}
"""Worked out once a class: Python takes long to read annotations."""


def types_of(cls: type[Any]) -> Mapping[str, Any]:
    """The annotated types of a dataclass's fields, by name."""
    if cls not in _TYPES:
        hints = typing.get_type_hints(cls)
        _TYPES[cls] = types.MappingProxyType({field.name: hints[field.name] for field in dataclasses.fields(cls)})
    return _TYPES[cls]


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return typing.get_args(annotation)
    return (annotation,)


def _group(cls: type[Any], raw: Any, prefix: str, unknown: UnknownKey, problems: list[str]) -> Any:
    known = types_of(cls)
    if not isinstance(raw, Mapping):
        names = ", ".join(known)
        problems.append(f"{prefix.rstrip('.')}={shown(raw)} is not a group of settings; known: {names}")
        return None
    values: dict[str, Any] = {}
    before = len(problems)
    for key, value in raw.items():
        if key not in known:
            problems.append(unknown(f"{prefix}{key}", value))
            continue
        values[key] = _convert(f"{prefix}{key}", value, known[key], unknown, problems)
    return cls(**values) if len(problems) == before else None


def _convert(path: str, value: Any, annotation: Any, unknown: UnknownKey, problems: list[str]) -> Any:
    options = alternatives(annotation)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return _group(annotation, value, f"{path}.", unknown, problems)
    if value is None and type(None) not in options:
        problems.append(f"{path} must not be empty; give {_describe(options)}")
        return None
    for option in options:
        fitting = _as_type(value, option)
        if fitting is not None:
            return fitting[0]
    choices = [str(choice) for option in options for choice in _choices(option)]
    if choices and bool in options:
        choices = ["true", "false", *choices]
    if choices:
        unset = ", or unset it" if type(None) in options else ""
        problems.append(f"{path}={shown(value)} is unknown; choose {', '.join(choices)}{unset}")
    else:
        problems.append(f"{path}={shown(value)} is not {_describe(options)}")
    return None


def _choices(option: Any) -> tuple[Any, ...]:
    return typing.get_args(option) if typing.get_origin(option) is typing.Literal else ()


def _as_type(value: Any, option: Any) -> tuple[Any] | None:
    """The value as that type in a tuple of one, or None if it does not fit."""
    origin = typing.get_origin(option) or option
    if option is Any or (option is type(None) and value is None):
        return (value,)
    if origin is typing.Literal:
        # Hydra and YAML read the choice `32` as a number.
        matching = [choice for choice in _choices(option) if str(choice) == str(value)]
        return (matching[0],) if matching and not isinstance(value, bool) else None
    if origin is list:
        items = [_as_type(item, typing.get_args(option)[0]) for item in value] if isinstance(value, list) else [None]
        return None if None in items else ([item[0] for item in items if item is not None],)
    if origin is dict:
        return (dict(value),) if isinstance(value, Mapping) else None
    plain = {bool: _as_switch, int: _as_whole, float: _as_number, str: _as_text}.get(option)
    converted = plain(value) if plain is not None else None
    return None if converted is None else (converted,)


def _as_switch(value: Any) -> bool | None:
    word = _SWITCHES.get(value.lower()) if isinstance(value, str) else value
    return word if isinstance(word, bool) else None


def _as_whole(value: Any) -> int | None:
    """Also `20.0`, and text (of an environment variable, for example) that is a whole number."""
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        return None
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _as_number(value: Any) -> float | None:
    """Also text: YAML reads `1e-3` as text."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _as_text(value: Any) -> str | None:
    """Also numbers: YAML reads durations and hub names of digits as such."""
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None


def _describe(options: Sequence[Any]) -> str:
    def word(option: Any) -> str:
        if typing.get_origin(option) is list:
            return "a list"
        choices = _choices(option)
        return f"one of {', '.join(map(str, choices))}" if choices else _WORDS.get(option, "a group")

    return " or ".join(dict.fromkeys(word(option) for option in options if option is not type(None)))
