"""Rows as they were read, with their numbers, and how messages name them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_lmpo.data.messages import RowError
from nemo_lmpo.data.text import PLAIN_TEXT, TextFormat, parse_line, place_of

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class RawRow:
    """A row as read, or what was wrong with it."""

    number: int
    """Line of a text file, else the row; counted from 1."""
    value: Any
    """The row's fields, or a :class:`RowError` if it could not be read."""


@dataclass(frozen=True)
class Places:
    """How messages name the rows of a source."""

    name: str
    """The path as given."""
    unit: str = "row"
    """`line` or `row`: what a row's number counts."""
    files: tuple[str, ...] = ()
    """The text files of a pattern, whose rows are counted through."""
    form: TextFormat = PLAIN_TEXT

    def __call__(self, number: int) -> str:
        """The place of a row."""
        return place_of(self.files, number, self.form) if self.files else f"{self.name} {self.unit} {number}"


def raw_rows(table: pa.Table, indices: Sequence[int]) -> list[RawRow]:
    """Rows of a part of :meth:`Source.rows`; ``indices`` are their places in the whole."""
    if table.column_names == ["number", "line"]:
        numbers, lines = (table.column(name).to_pylist() for name in table.column_names)
        return [RawRow(number, parse_line(line)) for number, line in zip(numbers, lines, strict=True)]
    try:
        values: list[Any] = table.to_pylist()
    except UnicodeDecodeError:
        values = [_row_value(table.slice(place, 1)) for place in range(table.num_rows)]
    return [RawRow(index + 1, _without_nulls(value)) for index, value in zip(indices, values, strict=True)]


def _without_nulls(value: Any) -> Any:
    """The value without fields that are null: objects of a column all have the same fields, whatever was in them."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _row_value(row: pa.Table) -> Any:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return RowError("not text", f"a field is not UTF-8 text ({error.reason} at byte {error.start})")
