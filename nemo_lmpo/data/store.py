"""Tokenized pairs on disk: an Arrow stream (what `datasets.Dataset.from_file` opens) and what there is to say of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from nemo_lmpo.data.encode import EncodedRow

PAIRS_FILE = "pairs.arrow"
META_FILE = "meta.json"


@dataclass
class StoreMeta:
    """What reading and tokenizing one source gave."""

    rows_read: int = 0
    pairs: int = 0
    prompts_cut: int = 0
    responses_cut: int = 0
    """Pairs of which at least one response was cut."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows not used, by reason."""
    first_bad: list[Any] | None = None
    """Number, reason and detail of the first row not used."""


def _schema() -> Any:
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    return pa.schema([("pair_id", pa.string()), ("prompt_ids", ids), ("chosen_ids", ids), ("rejected_ids", ids)])


class PairWriter:
    """Writes pairs batch by batch, so that memory does not grow with the data."""

    def __init__(self, directory: Path) -> None:
        import pyarrow as pa

        self.meta = StoreMeta()
        self._directory = directory
        self._file = pa.OSFile(str(directory / PAIRS_FILE), "wb")
        self._stream = pa.ipc.new_stream(self._file, _schema())
        self._seen: set[str] = set()

    def __enter__(self) -> PairWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        self._file.close()
        if kind is None:
            (self._directory / META_FILE).write_text(json.dumps(asdict(self.meta)), encoding="utf-8")

    def add(self, numbers: Sequence[int], pair_ids: Sequence[str], rows: Sequence[EncodedRow]) -> None:
        """Append pairs; an id that occurred before gets the row's number behind it."""
        import pyarrow as pa

        if not rows:
            return
        unique = []
        for number, pair_id in zip(numbers, pair_ids, strict=True):
            name = f"{pair_id}#{number}" if pair_id in self._seen else pair_id
            self._seen.add(name)
            unique.append(name)
        columns = [
            unique,
            *([getattr(row, name) for row in rows] for name in ("prompt_ids", "chosen_ids", "rejected_ids")),
        ]
        schema = _schema()
        arrays = [pa.array(values, type=kind) for values, kind in zip(columns, schema.types, strict=True)]
        self._stream.write_batch(pa.record_batch(arrays, schema=schema))
        self.meta.pairs += len(rows)
        self.meta.prompts_cut += sum(row.prompt_cut for row in rows)
        self.meta.responses_cut += sum(row.response_cut for row in rows)

    def drop(self, number: int, reason: str, detail: str) -> None:
        """Count a row that is not used."""
        self.meta.dropped[reason] = self.meta.dropped.get(reason, 0) + 1
        if self.meta.first_bad is None:
            self.meta.first_bad = [number, reason, detail]


def read_store(directory: Path) -> tuple[Any, StoreMeta] | None:
    """The memory-mapped table (columns `pair_id`, `prompt_ids`, `chosen_ids`, `rejected_ids`) and its description.

    Returns:
        None if the directory is not there, damaged or incomplete.
    """
    import pyarrow as pa

    try:
        meta = StoreMeta(**json.loads((directory / META_FILE).read_text(encoding="utf-8")))
        table = pa.ipc.open_stream(pa.memory_map(str(directory / PAIRS_FILE))).read_all()
    except (OSError, ValueError, TypeError, pa.ArrowException):
        return None
    return (table, meta) if table.num_rows == meta.pairs and table.schema.equals(_schema()) else None
