"""Where rows come from: files, saved datasets, the hub, generated tasks. Each source knows a hash of its content."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from nemo_lmpo.data.builtin.tiny_task import builtin_rows
from nemo_lmpo.data.hub import cache_only_without_network
from nemo_lmpo.data.schema import RowError
from nemo_lmpo.errors import DataError

BUILTIN_PREFIX = "builtin:"
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
_FILE_SUFFIXES = (*_JSON_SUFFIXES, ".parquet")
_HUB_NAME = re.compile(r"^[\w.\-]+(/[\w.\-]+)?$")


@dataclass(frozen=True)
class RawRow:
    """A row as read, or what was wrong with it."""

    number: int
    """Line of a text file, else the row; counted from 1."""
    value: Any
    """The row's fields, or a :class:`RowError` if it could not be read."""


@dataclass(frozen=True)
class Source:
    """One path of a dataset."""

    name: str
    """The path as given."""
    short_name: str
    """What pair ids begin with when rows have none: the same on every machine."""
    unit: str
    """`line` or `row`: what ``RawRow.number`` counts."""
    fingerprint: str
    """Changes whenever the content does."""
    read: Callable[[], Iterator[RawRow]]
    """Starts reading from the first row."""

    def location(self, number: int) -> str:
        """How messages name a row."""
        return f"{self.name} {self.unit} {number}"


def open_source(path: str, split: str, limit: int | None = None) -> Source:
    """Find a source and hash its content; rows are read only when asked for.

    Args:
        path: a JSONL(.gz) or Parquet file, a directory written by `datasets`' `save_to_disk`, `builtin:NAME`, or a
            hub name.
        split: the split of hub datasets, saved dataset dictionaries and builtin tasks; files have none.
        limit: only the first so many rows.

    Raises:
        DataError: nothing there, empty, no such split, or unreadable.
    """
    source = _open(path, split)
    if limit is None:
        return source
    return Source(
        source.name,
        source.short_name,
        source.unit,
        f"{source.fingerprint}/first {limit}",
        lambda: islice(source.read(), limit),
    )


def _open(path: str, split: str) -> Source:
    if path.startswith(BUILTIN_PREFIX):
        name = path.removeprefix(BUILTIN_PREFIX)
        rows = builtin_rows(name, split)
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return Source(path, f"{name}-{split}", "row", digest, lambda: _numbered(rows))
    file = Path(path).expanduser()
    if file.is_dir():
        return _saved_dataset(path, file, split)
    if file.is_file():
        return _file(path, file)
    if path.endswith(_FILE_SUFFIXES) or path.startswith(("/", ".", "~")) or not _HUB_NAME.match(path):
        raise DataError(f"{path} does not exist; give a JSONL(.gz) or Parquet file, a saved dataset or a hub name")
    return _hub_dataset(path, split)


def _numbered(rows: Any) -> Iterator[RawRow]:
    for number, row in enumerate(rows, start=1):
        yield RawRow(number, row)


def _file(path: str, file: Path) -> Source:
    if not path.endswith(_FILE_SUFFIXES):
        raise DataError(f"{path} has an unknown ending; supported: {', '.join(_FILE_SUFFIXES)}")
    try:
        if file.stat().st_size == 0:
            raise DataError(f"{path} is empty; give a file with preference pairs")
        digest = _hash_files([file])
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    if path.endswith(".parquet"):
        return Source(path, file.name, "row", digest, lambda: _read_parquet(path, file))
    return Source(path, file.name, "line", digest, lambda: _read_jsonl(path, file))


def _hash_files(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"\0{file.name}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _read_jsonl(path: str, file: Path) -> Iterator[RawRow]:
    number = 0
    opener: Callable[..., IO[bytes]] = gzip.open if path.endswith(".gz") else open  # type: ignore[assignment]
    try:
        with opener(file, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield RawRow(number, _parse_line(path, number, line))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path} is damaged after line {number} ({error}); restore the file, it may be a broken download"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read after line {number} ({error.strerror})") from None


def _parse_line(path: str, number: int, line: bytes) -> Any:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        return RowError("broken JSON", f"the line is not UTF-8 text ({error.reason} at byte {error.start})")
    except (json.JSONDecodeError, RecursionError) as error:
        if number == 1 and line.lstrip().startswith(b"["):
            raise DataError(f"{path} holds one JSON array; write one object a line, e.g. with: jq -c '.[]'") from None
        where = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        return RowError("broken JSON", f"the JSON is broken: {where}")
    if number == 1 and isinstance(row, list):
        raise DataError(f"{path} holds one JSON array; write one object a line, e.g. with: jq -c '.[]'")
    return row


def _read_parquet(path: str, file: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield RawRow(number, row)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file ({_first_line(error)}); restore the file") from None


def _saved_dataset(path: str, directory: Path, split: str) -> Source:
    import datasets

    folder = directory
    try:
        if (directory / "dataset_dict.json").exists():
            splits = json.loads((directory / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            if split not in splits:
                raise DataError(f"{path} has no split '{split}'; its splits are: {', '.join(splits)}")
            folder = directory / split
        elif not (directory / "state.json").exists():
            raise DataError(
                f"{path} is a directory that datasets' save_to_disk did not write; "
                "give such a directory, or the JSONL(.gz) or Parquet files themselves as a list"
            )
        if not json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]:
            raise DataError(f"{path} holds no rows; give a dataset with preference pairs")
        loaded = datasets.Dataset.load_from_disk(str(folder))
        files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("cache-"))
        return _arrow_source(path, directory.name, loaded, _hash_files(files))
    except DataError:
        raise
    except Exception as error:  # whatever a damaged directory makes pyarrow, json or datasets raise
        raise DataError(f"{path} is not a readable saved dataset ({_first_line(error)}); save it again") from None


def _hub_dataset(path: str, split: str) -> Source:
    import datasets

    try:
        with cache_only_without_network():
            loaded = datasets.load_dataset(path, split=split)
    except Exception as error:  # network, authentication, missing repository or split, unsafe loading script, ...
        raise DataError(
            f"{path} (split '{split}') is no file here and could not be loaded from the hub ({_first_line(error)}); "
            "check the name, the split and the network, or give a local file"
        ) from None
    return _arrow_source(path, path, loaded, str(loaded._fingerprint))


def _arrow_source(path: str, short_name: str, dataset: Any, fingerprint: str) -> Source:
    if len(dataset) == 0:
        raise DataError(f"{path} holds no rows; give a dataset with preference pairs")
    return Source(path, short_name, "row", fingerprint, lambda: _numbered(dataset))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
