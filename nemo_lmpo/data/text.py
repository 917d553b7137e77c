"""Text files as rows: JSON lines, JSON documents and CSV, compressed or not."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from nemo_lmpo.data.messages import RowError
from nemo_lmpo.errors import DataError, first_line

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
CSV_SUFFIXES = (".csv", ".tsv")
COMPRESSIONS = (".gz", ".zst")
TEXT_SUFFIXES = (*JSON_SUFFIXES, *CSV_SUFFIXES)
FILE_SUFFIXES = (*TEXT_SUFFIXES, *COMPRESSIONS, ".parquet")
"""How files are called that are read here."""
MOST_DOCUMENT_BYTES = 1 << 30
"""A file that is one JSON document is read as a whole; larger ones have to be written as lines."""

_SPACE = re.compile(r"\s*")

Line = tuple[int, bytes]
"""A row's number, from 1 (its line where rows are lines), and its JSON."""


def uncompressed_name(name: str) -> str:
    """A file name in small letters without the ending of a compression that is read here."""
    name = name.lower()
    return next((name.removesuffix(ending) for ending in COMPRESSIONS if name.endswith(ending)), name)


def read_lines(path: str, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a text file as `number` and `line` (JSON), the form in which `datasets` stores them.

    Args:
        path: the file.
        limit: only the first so many rows.

    Raises:
        DataError: the file breaks off or cannot be read.
    """
    lines = _csv_lines(path) if uncompressed_name(path).endswith(CSV_SUFFIXES) else _json_lines(path)
    for number, line in islice(lines, limit):
        yield {"number": number, "line": line}


def parse_line(line: bytes) -> Any:
    """The value of a row's JSON, or a :class:`RowError` that says what is wrong with it."""
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        return RowError("broken JSON", f"the line is not UTF-8 text ({error.reason} at byte {error.start})")
    except json.JSONDecodeError as error:
        return RowError("broken JSON", f"the JSON is broken: {error.msg} at column {error.colno}")
    except RecursionError:
        return RowError("broken JSON", "the JSON is broken: nested too deep")
    except ValueError:  # Python reads no integers of more than 4300 digits
        return RowError("broken JSON", "the JSON holds a number of too many digits")


def _raw_lines(path: str) -> Iterator[Line]:
    """Lines with their numbers, from 1; blank ones are left out."""
    number = 0
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, OSError) as error:
        if reason := getattr(error, "strerror", None):
            raise DataError(f"{path} cannot be read after line {number} ({reason})") from None
        # what decompression raises, of gzip and pyarrow alike, says no error of the system
        raise DataError(
            f"{path} is damaged after line {number} ({first_line(error)}); "
            "restore the file, it may be a broken download"
        ) from None


def _open(path: str) -> IO[bytes]:
    file = Path(path).expanduser()
    if path.lower().endswith(".gz"):
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if path.lower().endswith(".zst"):
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(file), compression="zstd"))
    return file.open("rb")


def is_document(path: str) -> bool:
    """Whether a JSON file is one document, or several over many lines each, instead of lines."""
    return _document(path) is not None


def _json_lines(path: str) -> Iterator[Line]:
    """JSON lines as they are; the rows of a file that is one or several JSON documents over many lines."""
    document = _document(path)
    if document is None:
        yield from _raw_lines(path)
        return
    for number, row in enumerate(document, start=1):
        yield number, json.dumps(row).encode()


def _may_be_document(start: list[Line]) -> bool:
    """Whether the first two lines can begin something longer than a line, or the only line is an array."""
    first = start[0][1].removeprefix(b"\xef\xbb\xbf").strip()
    if first in (b"[", b"{"):
        return True
    value = parse_line(first)
    if not isinstance(value, RowError):
        return isinstance(value, list) and len(start) == 1
    # before a line that is a whole row, the first one is a broken row
    return first[:1] in (b"[", b"{") and not (len(start) == 2 and isinstance(parse_line(start[1][1]), dict))


def _document(path: str) -> list[Any] | None:
    """The rows of an array, an object, or objects behind each other; None if the file is none of these."""
    start = list(islice(_raw_lines(path), 2))
    if not start or not _may_be_document(start):
        return None
    with _open(path) as stream:
        content = stream.read(MOST_DOCUMENT_BYTES + 1)
    if len(content) > MOST_DOCUMENT_BYTES:
        raise DataError(f"{path} is one large JSON document; write one object per line, e.g. with: jq -c '.[]'")
    try:
        text = content.decode("utf-8-sig").strip()
        decoder = json.JSONDecoder()
        values, place = [], 0
        while place < len(text):
            value, end = decoder.raw_decode(text, place)
            values.append(value)
            place = _SPACE.match(text, end).end()  # type: ignore[union-attr]
    except (ValueError, RecursionError):
        return None
    return values[0] if len(values) == 1 and isinstance(values[0], list) else values


def _csv_lines(path: str) -> Iterator[Line]:
    """Rows of a table whose first line names the columns, as JSON objects of texts; a number is a row's last line."""
    separator = "\t" if uncompressed_name(path).endswith(".tsv") else ","
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader((_decoded(path, *line) for line in _all_lines(path)), delimiter=separator, strict=True)
    try:
        for row in reader:
            if None in row:
                row = {"more cells than the first line names": row.pop(None)}
            yield reader.line_num, json.dumps(row).encode()
    except csv.Error as error:
        place = f"{path} line {reader.reader.line_num}"
        raise DataError(f"{place}: the table is broken ({error}); correct the file") from None


def _all_lines(path: str) -> Iterator[Line]:
    """Lines with their numbers; blank ones, too, as a quoted text may hold them."""
    before = 0
    for number, line in _raw_lines(path):
        yield from ((blank, b"\n") for blank in range(before + 1, number))
        yield number, line
        before = number


def _decoded(path: str, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} line {number} is not UTF-8 text ({error.reason} at byte {error.start}); convert the file"
        ) from None
