"""Columns of one's own: a row's columns under the names that layouts have for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nemo_lmpo.config.row_fields import ROW_FIELDS
from nemo_lmpo.data.messages import RowError, is_list
from nemo_lmpo.errors import shown

Columns = Mapping[str, Any]
"""Field of a layout -> column, path to a part of one, list of these, or None to hide a column of the field's name."""


def mapped(row: Any, columns: Columns | None) -> Any:
    """The row with its columns under the fields' names; what is not a row stays as it is.

    A column that the row does not have maps nothing: a file may hold rows of several layouts.

    Raises:
        RowError: a path leads into a text that is not JSON.
    """
    if not columns or not isinstance(row, Mapping):
        return row
    found = {field: _value(row, column) for field, column in columns.items()}
    used = {name for column in columns.values() for name in _used(row, column)} | set(columns)
    kept = {name: value for name, value in row.items() if name not in used or _stays(row, name, columns, found)}
    return {**kept, **{field: value for field, value in found.items() if value is not None}}


def _stays(row: Mapping[str, Any], name: str, columns: Columns, found: Mapping[str, Any]) -> bool:
    """Whether a column keeps its own name: its own field, where nothing was found for that; one only used in part."""
    if name in columns:
        return columns[name] is not None and found[name] is None
    whole = any(name in _listed(column) for column in columns.values())
    return not whole and name in ROW_FIELDS


def _listed(column: Any) -> list[Any]:
    return list(column) if is_list(column) else [column]


def _used(row: Mapping[str, Any], column: Any) -> set[str]:
    """Names of the row's columns that a mapping looks into."""
    return {name for one in _listed(column) if one is not None and (name := _column(row, str(one))[0]) in row}


def _column(row: Mapping[str, Any], path: str) -> tuple[str, list[str]]:
    """The column that a path begins with, and the steps behind it; a column may have dots in its name."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        if (name := ".".join(parts[:end])) in row:
            return name, parts[end:]
    return parts[0], parts[1:]


def _value(row: Mapping[str, Any], column: Any) -> Any:
    if column is None:
        return None
    if is_list(column):
        values = [_value(row, one) for one in column]
        return None if all(value is None for value in values) else values
    name, steps = _column(row, str(column))
    value = row.get(name)
    for step in steps:
        value = _step(value, step, str(column))
    return value


def _step(value: Any, step: str, path: str) -> Any:
    """A field of an object, an item of a list by its number, or a field of each of its items."""
    if isinstance(value, str):
        value = _from_json(value, path)
    if isinstance(value, Mapping):
        return value.get(step)
    if not is_list(value):
        return None
    if step.removeprefix("-").isdecimal():
        place = int(step)
        return value[place] if -len(value) <= place < len(value) else None
    return [_step(item, step, path) for item in value]


def _from_json(value: str, path: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RowError(
            "broken JSON", f"columns: the path {shown(path)} leads into a text that is not JSON: {shown(value)}"
        ) from None
