"""Tokenized pairs of one source on disk, and what there is to say of them without reading them.

Everything that has a value for each pair stays in files that are mapped into memory: many processes of a machine
share their pages, and what is not looked at costs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_lmpo.data.example import ANSWERS, CONVERSATIONS, PAIRS, Example, Response
from nemo_lmpo.runtime.files import file_checksum

if TYPE_CHECKING:
    import pyarrow as pa

PAIRS_FILE = "pairs.arrow"
"""`datasets` puts a worker's number into the name where there are several."""
META_FILE = "meta.json"
ROWS_FILE, LENGTHS_FILE, REPEATED_FILE = "rows.npy", "lengths.npy", "repeated.npy"
PARTS = ("prompt", "chosen", "rejected")
"""A conversation has its tokens in `chosen`, and no `rejected`."""


@dataclass
class StoreMeta:
    """What reading and tokenizing one source gave."""

    rows_read: int = 0
    pairs: int = 0
    """Usable rows, conversations and answers with a label among them."""
    conversations: int = 0
    desirable: int = 0
    """Answers with the label true."""
    undesirable: int = 0
    """Answers with the label false."""
    predicted: list[int] = field(default_factory=list)
    """How many chosen responses and conversations have 0, 1, 2, ... predicted tokens."""
    prompts_cut: int = 0
    responses_cut: int = 0
    """Pairs of which at least one response was cut."""
    special_tokens: int = 0
    """Pairs whose texts hold special tokens of the tokenizer."""
    notes: dict[str, int] = field(default_factory=dict)
    """Pairs by what there is to say of how the chat template lays them."""
    lost: dict[str, int] = field(default_factory=dict)
    """Pairs by what of their rows is not in their ids."""
    columns: dict[str, int] = field(default_factory=dict)
    """Pairs by columns of their rows that nothing uses."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows not used, by reason."""
    first_bad: list[Any] | None = None
    """Number, reason and detail of the first row not used."""
    max_tokens: list[int] = field(default_factory=lambda: [0, 0])
    """Row tokens of the longest pair with its prompt once, and twice."""
    token_hash: str = ""
    """Of the token ids of all pairs in their order."""
    histograms: list[list[int]] = field(default_factory=lambda: [[], [], []])
    """How many prompts, chosen and rejected responses have 0, 1, 2, ... tokens."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Size of each other file."""
    checksums: dict[str, str] = field(default_factory=dict)
    """Of each other file's content, compared when it is opened."""
    checksum: str = ""
    """Of all the rest."""


@dataclass(frozen=True)
class Store:
    """Tokenized pairs on disk; arrays are mapped into memory."""

    table: pa.Table
    """A row for each row of the source, the unusable ones, too (columns: :func:`pairs_schema`)."""
    rows: np.ndarray
    """``[pairs]`` int32: the table's rows that are pairs; ``~row`` is the rejected answer of a row by itself."""
    lengths: np.ndarray
    """``[pairs, 3]`` int32: tokens of prompt, chosen and rejected; 0 rejected ones where there is one response."""
    repeated: np.ndarray
    """Sorted int32: rows of the table whose id an earlier row has, too."""
    meta: StoreMeta

    def example_id(self, row: int) -> str:
        """The id of the pair in a row of the table; the row's number behind it where an earlier pair has the same."""
        if row < 0:
            return f"{self.example_id(~row)}/rejected"
        name, place = self.table.column("example_id")[row].as_py(), np.searchsorted(self.repeated, row)
        if place < len(self.repeated) and self.repeated[place] == row:
            return f"{name}#{self.table.column('number')[row].as_py()}"
        return str(name)

    def example(self, row: int, kind: str) -> Example:
        """The example of that kind in a row of the table."""
        if kind == ANSWERS:
            return self._answer(row)
        prompt, *responses = (self._numbers(f"{part}_ids", row) for part in PARTS[: 3 if kind == PAIRS else 2])
        borders = self._numbers("spans", row) if kind == CONVERSATIONS else []
        spans = tuple(zip(borders[::2], borders[1::2], strict=True)) or None
        return Example(self.example_id(row), prompt, tuple(Response(ids, spans) for ids in responses))

    def _answer(self, row: int) -> Example:
        place, side = (row, "chosen") if row >= 0 else (~row, "rejected")
        prompt, ids = self._numbers("prompt_ids", place), self._numbers(f"{side}_ids", place)
        said = self.table.column("desirable")[place].as_py()
        return Example(self.example_id(row), prompt, (Response(ids),), desirable=row >= 0 if said is None else said)

    def labels(self) -> np.ndarray:
        """``[pairs]`` bool: whether each answer is one to learn; those of pairs are by their side."""
        said = np.asarray(self.table.column("desirable").fill_null(True))
        labels: np.ndarray = said[np.maximum(self.rows, ~self.rows)] & (self.rows >= 0)
        return labels

    def as_answers(self) -> Store:
        """The same rows, each answer by itself: a pair is its chosen answer and, behind it, its rejected one."""
        both = self.lengths[:, 2] > 0
        if not both.any():
            return self
        places = np.repeat(np.arange(len(self.rows)), 1 + both)
        second = np.append(False, places[1:] == places[:-1])
        rows, lengths = np.where(second, ~self.rows[places], self.rows[places]), np.array(self.lengths[places])
        lengths[second, 1] = lengths[second, 2]
        lengths[:, 2] = 0
        histograms = [np.bincount(lengths[:, part]).tolist() for part in range(3)]
        meta = replace(self.meta, pairs=len(rows), histograms=histograms)
        return replace(self, rows=rows, lengths=lengths, meta=meta)

    def _numbers(self, column: str, row: int) -> list[int]:
        values = self.table.column(column)[row].values
        numbers: list[int] = [] if values is None else values.to_numpy().tolist()
        return numbers


def pairs_schema() -> pa.Schema:
    """Columns of a source's rows after tokenizing; an unusable row has a reason and no ids."""
    import pyarrow as pa

    ids, flag, text = pa.list_(pa.int32()), pa.bool_(), pa.string()
    return pa.schema(
        [
            ("number", pa.int64()),
            ("example_id", text),
            *((f"{part}_ids", ids) for part in PARTS),
            ("spans", ids),
            ("desirable", flag),
            ("prompt_cut", flag),
            ("response_cut", flag),
            ("special_tokens", flag),
            *((name, pa.list_(text)) for name in ("notes", "lost", "columns")),
            ("reason", text),
            ("detail", text),
        ]
    )


def summarize_store(directory: Path) -> StoreMeta:
    """Write what stands beside the tokenized rows in ``directory`` (see :class:`Store`), and give it."""
    import xxhash

    # It brings torch, whose second of imports the processes that tokenize do without.
    from nemo_lmpo.data.pack import example_tokens

    table = _read_table(directory)
    meta = _counted(table)
    # one hash for each column: how many rows a batch has, which the number of workers decides, does not matter
    tokens = [xxhash.xxh3_128() for _ in range(4)]
    rows, lengths, hashes = [np.empty(0, np.int32)], [np.empty((0, 3), np.int32)], [np.empty(0, np.uint64)]
    start = 0
    for batch in table.to_batches():
        good = np.asarray(batch.column("reason").is_null())
        rows.append((start + np.flatnonzero(good)).astype(np.int32))
        lengths.append(_lengths(batch)[good])
        hashes.append(_hashes(batch))
        columns = [lengths[-1], *(np.asarray(batch.column(f"{part}_ids").flatten()) for part in PARTS)]
        if batch.column("spans").null_count < batch.num_rows:
            columns[-1] = np.concatenate([columns[-1], np.asarray(batch.column("spans").flatten())])
        for digest, column in zip(tokens, columns, strict=True):
            digest.update(column.tobytes())
        start += batch.num_rows
    if meta.desirable or meta.undesirable:
        labels = np.asarray(table.column("desirable").cast("int8").fill_null(2))  # 2: a pair
        tokens.append(xxhash.xxh3_128(labels[np.concatenate(rows)].tobytes()))
    found = np.concatenate(lengths)
    meta.pairs = len(found)
    meta.conversations = int((found[:, 2] == 0).sum()) - meta.desirable - meta.undesirable
    meta.predicted = _predicted(table)
    meta.token_hash = "".join(digest.hexdigest() for digest in tokens)
    meta.max_tokens = [int(example_tokens(found, share).max(initial=0)) for share in (True, False)]
    meta.histograms = [np.bincount(found[:, part]).tolist() for part in range(3)]
    np.save(directory / ROWS_FILE, np.concatenate(rows))
    np.save(directory / LENGTHS_FILE, found)
    np.save(directory / REPEATED_FILE, _repeated(np.concatenate(hashes)))
    meta.bytes = {path.name: path.stat().st_size for path in _files(directory)}
    meta.checksums = {path.name: file_checksum(path) for path in _files(directory)}
    meta.checksum = _own_checksum(meta)
    (directory / META_FILE).write_text(json.dumps(asdict(meta)), encoding="utf-8")
    return meta


def _own_checksum(meta: StoreMeta) -> str:
    """Of what the file holds besides, as it is written."""
    import xxhash

    return str(xxhash.xxh3_128_hexdigest(json.dumps(asdict(replace(meta, checksum="")), sort_keys=True).encode()))


def _counted(table: pa.Table) -> StoreMeta:
    import pyarrow as pa
    import pyarrow.compute as pc

    meta = StoreMeta(rows_read=table.num_rows)
    meta.prompts_cut, meta.responses_cut, meta.special_tokens = (
        pc.sum(table.column(name)).as_py() or 0 for name in ("prompt_cut", "response_cut", "special_tokens")
    )
    labels = table.column("desirable")
    meta.desirable = pc.sum(labels).as_py() or 0
    meta.undesirable = len(labels) - labels.null_count - meta.desirable
    reasons = table.column("reason")
    meta.dropped = _counts(reasons.drop_null())
    meta.notes, meta.lost, meta.columns = (
        _counts(pc.list_flatten(table.column(name))) for name in ("notes", "lost", "columns")
    )
    if meta.dropped:
        first = pc.index(reasons.is_valid(), pa.scalar(True)).as_py()
        meta.first_bad = [table.column(name)[first].as_py() for name in ("number", "reason", "detail")]
    return meta


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {one["values"]: one["counts"] for one in column.value_counts().to_pylist()}


def _lengths(batch: pa.RecordBatch) -> np.ndarray:
    import pyarrow.compute as pc

    columns = (pc.fill_null(pc.list_value_length(batch.column(f"{part}_ids")), 0) for part in PARTS)
    return np.stack([np.asarray(column) for column in columns], axis=1).astype(np.int32)


def _predicted(table: pa.Table) -> list[int]:
    """How many chosen responses and conversations have 0, 1, 2, ... predicted tokens."""
    import pyarrow.compute as pc

    counts = np.zeros(1, dtype=np.int64)
    for batch in table.to_batches():
        good = np.asarray(batch.column("reason").is_null())
        lengths = _lengths(batch)[:, 1]
        borders = pc.fill_null(pc.list_value_length(batch.column("spans")), 0).to_numpy(zero_copy_only=False)
        flat = np.asarray(batch.column("spans").flatten()).astype(np.int64)
        sums = np.add.reduceat(np.append(flat[1::2] - flat[::2], 0), np.append(0, np.cumsum(borders // 2)[:-1]))
        found = np.bincount(np.where(borders > 0, sums[: len(lengths)], lengths)[good])
        counts, shorter = (found, counts) if len(found) > len(counts) else (counts, found)
        counts[: len(shorter)] += shorter
    listed: list[int] = counts.tolist()
    return listed


def _hashes(batch: pa.RecordBatch) -> np.ndarray:
    """64 bits for each id: enough to find those that occur twice without holding texts."""
    import xxhash

    ids = batch.column("example_id").cast("binary").to_pylist()
    return np.fromiter((xxhash.xxh3_64_intdigest(example_id) for example_id in ids), np.uint64, len(ids))


def _repeated(hashes: np.ndarray) -> np.ndarray:
    """Places whose value stands at an earlier place, too, sorted."""
    order = np.argsort(hashes, kind="stable")
    again = np.flatnonzero(hashes[order][1:] == hashes[order][:-1]) + 1
    return np.sort(order[again]).astype(np.int32)


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.iterdir()) if path.suffix in (".arrow", ".npy"))


def _read_table(directory: Path) -> pa.Table:
    """All rows, mapped into memory; of several workers one behind the other."""
    import pyarrow as pa

    files = sorted(directory.glob("pairs*.arrow"))
    tables = [pa.ipc.open_stream(pa.memory_map(str(path))).read_all() for path in files]
    schema = pairs_schema()
    return pa.concat_tables([table.cast(schema) for table in tables]) if tables else schema.empty_table()


def read_store(directory: Path) -> Store | None:
    """Open what tokenizing left in ``directory``; all of it is read once, to compare it with its checksums.

    Returns:
        None if the directory is not there, damaged or incomplete.
    """
    import pyarrow as pa

    try:
        meta = StoreMeta(**json.loads((directory / META_FILE).read_text(encoding="utf-8")))
        if meta.checksum != _own_checksum(meta):
            return None
        if meta.bytes != {path.name: path.stat().st_size for path in _files(directory)}:
            return None
        if meta.checksums != {path.name: file_checksum(path) for path in _files(directory)}:
            return None
        table = _read_table(directory)
        rows, lengths, repeated = (
            np.asarray(np.load(directory / name, mmap_mode="r", allow_pickle=False))
            for name in (ROWS_FILE, LENGTHS_FILE, REPEATED_FILE)
        )
    except (OSError, ValueError, TypeError, pa.ArrowException):
        return None
    fits = table.num_rows == meta.rows_read and len(rows) == len(lengths) == meta.pairs
    return Store(table, rows, lengths, repeated, meta) if fits else None
