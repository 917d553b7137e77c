"""Rows of one source as token ids: `datasets` reads, maps in one or several processes, and writes."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_lmpo.data.encode import EncodedRow, Encoder
from nemo_lmpo.data.messages import RowError
from nemo_lmpo.data.progress import on_terminal, progress_bars
from nemo_lmpo.data.raw import Places, RawRow, raw_rows
from nemo_lmpo.data.read import Source
from nemo_lmpo.data.rows.form import RowForm
from nemo_lmpo.data.schema import Row
from nemo_lmpo.data.store import PAIRS_FILE, StoreMeta, pairs_schema, summarize_store
from nemo_lmpo.errors import DataError, shown
from nemo_lmpo.runtime.threads import in_order

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

logger = logging.getLogger(__name__)

CHUNK_ROWS = 256
"""Rows that are tokenized in one call."""
BATCH_ROWS = 4096
"""Rows of one record batch on disk; each costs every process some kilobytes as long as the file is open."""
THREADS = 3
"""Threads of one process that read, render and hand texts to the tokenizer: one of its calls waits for the next."""
_TOKENIZER_THREADS = "RAYON_NUM_THREADS"
SMALL_DATA_ROWS = 50_000
"""Up to so many rows one process suffices: the tokenizer's own threads use the other cores (about a minute)."""
MOST_WORKERS = 32
"""Chosen at most when `data.num_workers` is unset: each process takes seconds and memory to start."""


@dataclass(frozen=True)
class RowsToPairs:
    """What `datasets` maps over a source: rows in, pairs out; a row that cannot be used says why in its columns."""

    encoder: Encoder
    form: RowForm
    short_name: str
    stop_at: Places | None
    """What an error calls the source's rows, if it is to stop at one that cannot be used."""
    on_unused_fields: str = "warn"
    """As `data.on_unused_fields`."""

    def __call__(self, table: pa.Table, indices: Sequence[int]) -> pa.Table:
        """The pairs of ``table`` (columns of :func:`pairs_schema`); ``indices`` are its rows' places in the source.

        Raises:
            DataError: the first row that cannot be used, where one has to stop.
        """
        import pyarrow as pa

        starts = range(0, table.num_rows, CHUNK_ROWS)
        return pa.concat_tables(
            [self.chunk(table.slice(at, CHUNK_ROWS), indices[at : at + CHUNK_ROWS]) for at in starts]
        )

    def chunk(self, table: pa.Table, indices: Sequence[int]) -> pa.Table:
        """As the call, for as few rows as may be tokenized at once; several threads may be in it."""
        import pyarrow as pa

        return pa.Table.from_pylist(list(self._pairs(raw_rows(table, indices))), schema=pairs_schema())

    def _pairs(self, rows: list[RawRow]) -> Iterator[dict[str, Any]]:
        rows = [self.form.named(raw) for raw in rows]
        parsed = [self._parsed(raw.value) for raw in rows]
        encoded = iter(self.encoder.encode([row for row in parsed if not isinstance(row, RowError)]))
        for raw, result in zip(rows, parsed, strict=True):
            row = result if isinstance(result, RowError) else self._judged(next(encoded))
            place = {"number": raw.number, "example_id": example_id(raw, self.short_name)}
            if not isinstance(row, RowError) and not isinstance(result, RowError):
                yield place | vars(row) | {"columns": result.columns, "notes": (*result.notes, *row.notes)}
                continue
            assert isinstance(row, RowError)
            kind = "pair" if self.form.takes == ("pairs",) else "row"
            detail = f"{row.detail} ({kind} {shown(place['example_id'])})"
            if self.stop_at is not None:
                raise bad_row_error(self.stop_at(raw.number), detail)
            yield place | {"reason": row.reason, "detail": detail}

    def _judged(self, row: EncodedRow | RowError) -> EncodedRow | RowError:
        """A row of which something is not in its ids, under `data.on_unused_fields=error`."""
        if isinstance(row, RowError) or not row.lost or self.on_unused_fields == "warn":
            return row
        return unused_field_error(row.lost)

    def _parsed(self, value: Any) -> Row | RowError:
        try:
            return self.form.parse(value)
        except RowError as error:
            return error


def tokenize_source(
    source: Source,
    encoder: Encoder,
    form: RowForm,
    directory: Path,
    *,
    on_bad_row: str,
    on_unused_fields: str,
    num_workers: int | None,
) -> None:
    """Write the tokenized pairs of ``source`` into ``directory`` in the order of its rows.

    Raises:
        DataError: the source breaks while reading; or, for ``on_bad_row="error"``, at an unusable row.
    """
    stop_at = source.places if on_bad_row == "error" else None
    job = RowsToPairs(encoder, form, source.short_name, stop_at, on_unused_fields)
    rows_directory, started = directory / "rows", time.monotonic()
    try:
        with progress_bars(show=False):
            rows = source.rows(str(rows_directory))
        if len(rows):
            _map(rows, job, directory, num_workers)
        meta = summarize_store(directory)
        _log_rate(source, meta, time.monotonic() - started)
    finally:
        shutil.rmtree(rows_directory, ignore_errors=True)


def _log_rate(source: Source, meta: StoreMeta, seconds: float) -> None:
    rows, tokens = meta.rows_read, sum(count * place for part in meta.histograms for place, count in enumerate(part))
    logger.info(
        "tokenized %s: %s rows and %s tokens in %.1f s (%s rows/s, %s tokens/s)",
        *(source.name, f"{rows:,}", f"{tokens:,}", seconds),
        *(f"{number / max(seconds, 1e-3):,.0f}" for number in (rows, tokens)),
    )


def unused_field_error(lost: Sequence[str]) -> RowError:
    """Why a row cannot be used of which something is not trained, under `data.on_unused_fields=error`."""
    return RowError("field not used", f"{', '.join(lost)}: not in what is trained (data.on_unused_fields=error)")


def bad_row_error(location: str, detail: str) -> DataError:
    """The error for an unusable row."""
    return DataError(f"{location}: {detail}; correct the row, or set data.on_bad_row=skip to leave such rows out")


def example_id(raw: RawRow, short_name: str) -> str:
    """A row's `prompt_id` or `id`, else its place."""
    if isinstance(raw.value, Mapping):
        for name in ("prompt_id", "id"):
            value = raw.value.get(name)
            if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
                return str(value).encode(errors="replace").decode()  # an id need not be valid text
    return f"{short_name}:{raw.number}"


def _map(rows: datasets.Dataset, job: RowsToPairs, directory: Path, num_workers: int | None) -> None:

    large = len(rows) > SMALL_DATA_ROWS
    if num_workers is None:
        num_workers = min(_cpu_cores(), MOST_WORKERS) if large else 1
    num_workers = min(num_workers, len(rows))
    with progress_bars(show=large and on_terminal()):
        if num_workers > 1:
            _in_processes(rows, job, directory, num_workers)
        else:
            _in_threads(rows, job, directory)


def _in_threads(rows: datasets.Dataset, job: RowsToPairs, directory: Path) -> None:
    """All rows in this process: while the tokenizer's own threads work on one chunk, others are read and rendered.

    The tokenizer holds no lock of Python meanwhile. This thread writes.
    """
    import datasets
    import pyarrow as pa
    from datasets.arrow_writer import ArrowWriter

    def chunk(start: int) -> pa.Table:
        indices = range(start, min(start + CHUNK_ROWS, len(rows)))
        return job.chunk(rows[indices.start : indices.stop], indices)

    job.encoder.special_tokens.tokenize(["a"])  # sets the tokenizer's state, which no thread may change for another
    threads = THREADS if job.encoder.tokenizer.is_fast else 1
    features = datasets.Features.from_arrow_schema(pairs_schema())
    tables = in_order(chunk, range(0, len(rows), CHUNK_ROWS), workers=threads, name="tokenize")
    with (
        contextlib.closing(tables),
        datasets.utils.tqdm(total=len(rows), unit=" examples", desc="tokenizing") as bar,
        ArrowWriter(
            path=str(directory / PAIRS_FILE), features=features, writer_batch_size=BATCH_ROWS, fingerprint="pairs"
        ) as writer,
    ):
        while batch := list(islice(tables, BATCH_ROWS // CHUNK_ROWS)):
            writer.write_table(pa.concat_tables(batch))
            bar.update(sum(map(len, batch)))
        writer.finalize()


def _in_processes(rows: datasets.Dataset, job: RowsToPairs, directory: Path, num_workers: int) -> None:
    """All rows in several processes, each with as many of the tokenizer's threads as there are cores for it."""
    import datasets

    try:
        with _spawned_workers(num_workers):
            rows.map(
                job,
                with_indices=True,
                batched=True,
                batch_size=BATCH_ROWS,
                writer_batch_size=BATCH_ROWS,
                remove_columns=rows.column_names,
                features=datasets.Features.from_arrow_schema(pairs_schema()),
                num_proc=num_workers,
                load_from_cache_file=False,
                cache_file_name=str(directory / PAIRS_FILE),
                new_fingerprint="pairs",
                desc="tokenizing",
            )
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        raise DataError(
            "a process that tokenizes died (out of memory, or started from a script without "
            "`if __name__ == '__main__'`); set data.num_workers=1"
        ) from None


def _cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _spawned_workers(number: int) -> Iterator[None]:
    """Inside, `datasets` starts its workers anew: the threads of torch and of a process group survive no fork.

    Each tokenizes with its share of the cores, unless the user says how many threads it may have.
    """
    import multiprocess

    before, threads = multiprocess.get_start_method(allow_none=True), os.environ.get(_TOKENIZER_THREADS)
    multiprocess.set_start_method("spawn", force=True)
    os.environ[_TOKENIZER_THREADS] = threads or str(max(1, _cpu_cores() // number))
    try:
        yield
    finally:
        multiprocess.set_start_method(before, force=True)
        if threads is None:
            del os.environ[_TOKENIZER_THREADS]
