"""One source tokenized into a store, by one or several processes."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from nemo_lmpo.data.encode import EncodedRow, PairEncoder
from nemo_lmpo.data.read import RawRow, Source
from nemo_lmpo.data.schema import RowError, parse_row
from nemo_lmpo.data.store import PairWriter
from nemo_lmpo.errors import DataError

CHUNK_ROWS = 256
SMALL_DATA_ROWS = 50_000
"""Up to so many rows one process suffices: the tokenizer's own threads use the other cores (about a minute)."""
MOST_WORKERS = 32
"""Chosen at most when `data.num_workers` is unset: each process takes seconds and memory to start."""


@dataclass
class _Chunk:
    """Rows of one chunk after tokenisation."""

    numbers: list[int]
    pair_ids: list[str]
    rows: list[EncodedRow]
    bad: list[tuple[int, str, str]]
    read: int


def tokenize_source(
    source: Source, encoder: PairEncoder, schema: str, directory: Path, *, on_bad_row: str, num_workers: int | None
) -> None:
    """Write the tokenized pairs of ``source`` into ``directory`` in the order of its rows.

    Raises:
        DataError: the source breaks while reading; or, for ``on_bad_row="error"``, at the first unusable row.
    """
    rows = source.read()
    chunks = iter(lambda: list(islice(rows, CHUNK_ROWS)), [])
    job = (encoder, schema, source.short_name)
    with PairWriter(directory) as writer:
        for chunk in _encoded_chunks(chunks, job, num_workers):
            writer.meta.rows_read += chunk.read
            for number, reason, detail in chunk.bad:
                if on_bad_row == "error":
                    raise bad_row_error(source, number, detail)
                writer.drop(number, reason, detail)
            writer.add(chunk.numbers, chunk.pair_ids, chunk.rows)


def bad_row_error(source: Source, number: int, detail: str) -> DataError:
    """The error for an unusable row."""
    return DataError(
        f"{source.location(number)}: {detail}; correct the row, or set data.on_bad_row=skip to leave such rows out"
    )


def _encoded_chunks(
    chunks: Iterator[list[RawRow]], job: tuple[PairEncoder, str, str], num_workers: int | None
) -> Iterator[_Chunk]:
    """Chunks in order, from this process or from workers; unless told, workers start once the data proves large."""
    if num_workers is None:
        for chunk in islice(chunks, SMALL_DATA_ROWS // CHUNK_ROWS):
            yield _encode_chunk(chunk, *job)
        first = next(chunks, None)
        if first is None:
            return
        chunks = chain([first], chunks)
        num_workers = min(_cpu_cores(), MOST_WORKERS)
    if num_workers <= 1:
        yield from (_encode_chunk(chunk, *job) for chunk in chunks)
    else:
        yield from _encoded_by_workers(chunks, job, num_workers)


def _encoded_by_workers(
    chunks: Iterator[list[RawRow]], job: tuple[PairEncoder, str, str], num_workers: int
) -> Iterator[_Chunk]:
    # spawn: the parent may already hold threads of torch or of a process group, which do not survive a fork
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker, initargs=job)
    try:
        waiting: deque[Future[_Chunk]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) > 2 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a process that tokenizes died (out of memory, or started from a script without "
            "`if __name__ == '__main__'`); set data.num_workers=1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_worker_job: tuple[PairEncoder, str, str] | None = None


def _start_worker(encoder: PairEncoder, schema: str, short_name: str) -> None:
    global _worker_job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_job = (encoder, schema, short_name)


def _encode_in_worker(chunk: list[RawRow]) -> _Chunk:
    assert _worker_job is not None
    return _encode_chunk(chunk, *_worker_job)


def _encode_chunk(chunk: list[RawRow], encoder: PairEncoder, schema: str, short_name: str) -> _Chunk:
    numbers, pair_ids, parsed = [], [], []
    result = _Chunk([], [], [], [], read=len(chunk))
    for raw in chunk:
        pair_id = _pair_id(raw, short_name)
        try:
            if isinstance(raw.value, RowError):
                raise raw.value
            parsed.append(parse_row(raw.value, schema))
        except RowError as error:
            result.bad.append((raw.number, error.reason, f"{error.detail} (pair {pair_id})"))
            continue
        numbers.append(raw.number)
        pair_ids.append(pair_id)
    for number, pair_id, row in zip(numbers, pair_ids, encoder.encode(parsed), strict=True):
        if isinstance(row, RowError):
            result.bad.append((number, row.reason, f"{row.detail} (pair {pair_id})"))
            continue
        result.numbers.append(number)
        result.pair_ids.append(pair_id)
        result.rows.append(row)
    result.bad.sort()
    return result


def _pair_id(raw: RawRow, short_name: str) -> str:
    if isinstance(raw.value, Mapping):
        for name in ("prompt_id", "id"):
            value = raw.value.get(name)
            if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
                return str(value).encode(errors="replace").decode()  # an id need not be valid text
    return f"{short_name}:{raw.number}"
