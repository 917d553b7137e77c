"""How the rows of a source become rows of the kind that a loss takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nemo_lmpo.data.messages import RowError
from nemo_lmpo.data.raw import RawRow
from nemo_lmpo.data.rows.columns import Columns, mapped
from nemo_lmpo.data.rows.parse import parse_taken
from nemo_lmpo.data.schema import Row


@dataclass(frozen=True)
class RowForm:
    """What a source's rows look like, and what they are needed as."""

    schema: str = "auto"
    """As `data.train.schema`."""
    columns: Columns | None = None
    """As one of `data.train.columns`."""
    takes: tuple[str, ...] = ("pairs",)
    """The kinds of rows that the loss takes."""

    def key(self) -> dict[str, Any]:
        """What decides the rows, for a hash."""
        columns = {"columns": dict(self.columns)} if self.columns else {}
        return {"schema": self.schema, "takes": list(self.takes), **columns}

    def named(self, raw: RawRow) -> RawRow:
        """A row as read, its columns under the names that layouts have for them; or why that cannot be."""
        if not self.columns:
            return raw
        try:
            return replace(raw, value=mapped(raw.value, self.columns))
        except RowError as error:
            return replace(raw, value=error)

    def parse(self, value: Any) -> Row:
        """The value of a :meth:`named` row in the one form of the kind that is needed.

        Raises:
            RowError: the row cannot be used.
        """
        return parse_taken(value, self.schema, self.takes)
