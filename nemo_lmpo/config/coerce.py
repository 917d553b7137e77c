"""Plain values as a dataclass: the one place where what a user wrote becomes typed settings, losses' options included.

Types are those that the fields are annotated with: `bool`, `int`, `float`, `str`, `Literal`, lists, groups (another
dataclass), mappings, `None`, and unions of these; bounds are those of :func:`nemo_lmpo.settings.setting`. All problems
are collected, one sentence each, and :data:`REFUSED` takes the place of a refused value, so that rules about several
settings can still look at the others.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from nemo_lmpo.errors import ConfigError, one_per_line, shown
from nemo_lmpo.runtime.credentials import stripped
from nemo_lmpo.settings import limits_of, out_of_bounds

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
        unknown: says what is wrong with a name that is not a field.

    Raises:
        ConfigError: with every unknown name, wrong type, unknown choice and value out of bounds, one a line.
    """
    problems: list[str] = []
    value = collect(cls, raw, prefix=prefix, unknown=unknown, problems=problems)
    raise_all(problems)
    return value


def collect(cls: type[Any], raw: Any, *, prefix: str = "", unknown: UnknownKey, problems: list[str]) -> Any:
    """As :func:`coerce`, but problems are appended, and :data:`REFUSED` stands for the values that have one."""
    known, fields = types_of(cls), {of.name: of for of in dataclasses.fields(cls)}
    if not isinstance(raw, Mapping):
        names = ", ".join(known)
        problems.append(f"{prefix.rstrip('.')}={shown(raw)} is not a group of settings; known: {names}")
        return REFUSED
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in known:
            problems.extend(unknown(*leaf) for leaf in _leaves(f"{prefix}{key}", value))
            continue
        path = f"{prefix}{key}"
        converted = _convert(path, value, known[key], unknown, problems)
        problem = None if converted is REFUSED else out_of_bounds(path, converted, limits_of(fields[key]))
        if problem is not None:
            problems.append(problem)
        values[key] = converted if problem is None else REFUSED
    return cls(**values)


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every key below one that is unknown; itself, where none is."""
    if isinstance(value, Mapping) and value:
        for name, below in value.items():
            yield from _leaves(f"{key}.{name}", below)
    else:
        yield key, value


def raise_all(problems: Sequence[str]) -> None:
    """Raise the problems, if there are any.

    Raises:
        ConfigError: with all of them, one a line.
    """
    if problems:
        raise ConfigError(one_per_line(problems))


class UsesRefusedValueError(Exception):
    """A rule looked at a value that has been refused already; nothing is known about it."""


class _Refused:
    """A value that every use but `is` stops at."""


def _stop(*_: object) -> typing.NoReturn:
    raise UsesRefusedValueError


for _use in (
    *("bool", "len", "iter", "contains", "getitem", "getattr", "call", "hash", "repr", "str", "format", "int", "float"),
    *("eq", "ne", "lt", "le", "gt", "ge", "neg", "abs"),
    *(f"{side}{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow") for side in ("", "r")),
):
    setattr(_Refused, f"__{_use}__", _stop)

REFUSED: Any = _Refused()
"""In place of a value that was refused, while the other ones are looked at."""


def as_far_as_known(rule: Iterator[str]) -> Iterator[str]:
    """The sentences of a rule, up to where it looks at a refused value."""
    try:
        yield from rule
    except UsesRefusedValueError:
        return


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


def _convert(path: str, value: Any, annotation: Any, unknown: UnknownKey, problems: list[str]) -> Any:
    options = alternatives(annotation)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return collect(annotation, value, prefix=f"{path}.", unknown=unknown, problems=problems)
    if value is None and type(None) not in options:
        problems.append(f"{path} must not be empty; give {_describe(options)}")
        return REFUSED
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
    return REFUSED


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
    if origin is list and isinstance(value, str) and typing.get_args(option) == (str,):
        return ([value],)  # one name, as PEFT takes `all-linear`
    if origin is list:
        if isinstance(value, str) and typing.get_args(option)[0] is str:
            value = [value]  # `all-linear`, as PEFT writes it
        items = [_as_type(item, typing.get_args(option)[0]) for item in value] if isinstance(value, list) else [None]
        return None if None in items else ([item[0] for item in items if item is not None],)
    if origin is dict:
        return (_without_credentials(dict(value)),) if isinstance(value, Mapping) else None
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
    """Also numbers: YAML reads durations and hub names of digits as such. An address keeps its credentials apart."""
    return stripped(str(value)) if isinstance(value, str | int | float) and not isinstance(value, bool) else None


def _without_credentials(value: Any) -> Any:
    """A mapping of any depth whose addresses have no credentials."""
    if isinstance(value, Mapping):
        return {key: _without_credentials(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_credentials(inner) for inner in value]
    return stripped(value) if isinstance(value, str) else value


def _describe(options: Sequence[Any]) -> str:
    def word(option: Any) -> str:
        if typing.get_origin(option) is list:
            return "a list"
        choices = _choices(option)
        return f"one of {', '.join(map(str, choices))}" if choices else _WORDS.get(option, "a group")

    return " or ".join(dict.fromkeys(word(option) for option in options if option is not type(None)))
