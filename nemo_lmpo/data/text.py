"""Text files as rows: JSON lines, JSON documents and CSV, compressed or not."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
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

_DELIMITERS = (",", ";", "\t", "|")

Line = tuple[int, bytes]
"""A row's number, from 1 (its line where rows are lines), and its JSON."""


@dataclass(frozen=True)
class TextFormat:
    """How text files are to be read."""

    encoding: str = "utf-8"
    """As `data.train.encoding`."""
    delimiter: str | None = None
    """As `data.train.delimiter`."""

    @property
    def is_utf8(self) -> bool:
        """Whether lines can be taken as they are."""
        return codecs.lookup(self.encoding).name in ("utf-8", "utf-8-sig")

    def key(self) -> str:
        """What belongs into a hash of a file's rows beside its content; empty where nothing was set."""
        parts = [] if self.is_utf8 else [f"encoding {codecs.lookup(self.encoding).name}"]
        parts += [] if self.delimiter is None else [f"delimiter {self.delimiter}"]
        return "".join(f"/{part}" for part in parts)


PLAIN_TEXT = TextFormat()


def uncompressed_name(name: str) -> str:
    """A file name in small letters without the ending of a compression that is read here."""
    name = name.lower()
    return next((name.removesuffix(ending) for ending in COMPRESSIONS if name.endswith(ending)), name)


def read_lines(
    paths: Sequence[str], limit: int | None = None, form: TextFormat = PLAIN_TEXT
) -> Iterator[dict[str, Any]]:
    """The rows of text files as `number` and `line` (JSON), the form in which `datasets` stores them.

    Args:
        paths: the files; of several, rows are counted through.
        limit: only the first so many rows.
        form: encoding and delimiter.

    Raises:
        DataError: the file breaks off or cannot be read.
    """
    rows = (row for path in paths for row in _lines_of(path, form))
    for place, (number, line) in enumerate(islice(rows, limit), start=1):
        yield {"number": number if len(paths) == 1 else place, "line": line}


def place_of(paths: Sequence[str], number: int, form: TextFormat = PLAIN_TEXT) -> str:
    """File and line of a row of several files, by its place in all of them; the files are read up to there."""
    rows = ((path, line) for path in paths for line, _ in _lines_of(path, form))
    path, line = next(islice(rows, number - 1, None), (paths[-1], number))
    return f"{path} {text_unit(path, form)} {line}"


def text_unit(path: str, form: TextFormat = PLAIN_TEXT) -> str:
    """What the numbers of a text file's rows count: `line`, or `row` of a JSON document."""
    table = uncompressed_name(path).endswith(CSV_SUFFIXES)
    return "row" if not table and _document(path, form) is not None else "line"


def _lines_of(path: str, form: TextFormat) -> Iterator[Line]:
    table = uncompressed_name(path).endswith(CSV_SUFFIXES)
    return _csv_lines(path, form) if table else _json_lines(path, form)


def parse_line(line: bytes) -> Any:
    """The value of a row's JSON, or a :class:`RowError` that says what is wrong with it."""
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        said = f"the line is not UTF-8 text ({error.reason} at byte {error.start}); {_meant_encoding(line)}"
        return RowError("broken JSON", said)
    except json.JSONDecodeError as error:
        return RowError("broken JSON", f"the JSON is broken: {error.msg} at column {error.colno}")
    except RecursionError:
        return RowError("broken JSON", "the JSON is broken: nested too deep")
    except ValueError:  # Python reads no integers of more than 4300 digits
        return RowError("broken JSON", "the JSON holds a number of too many digits")


def _meant_encoding(line: bytes) -> str:
    """What the bytes of a line that is not UTF-8 look like, and what to do."""
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "it begins as UTF-16 does: set data.train.encoding=utf-16, or convert the file"
    try:
        letter = next(letter for letter in line.decode("cp1252") if not letter.isascii())
    except (UnicodeDecodeError, StopIteration):
        return "convert the file, or name its encoding: data.train.encoding=latin-1, ..."
    return (
        f"it looks like Latin-1 or Windows text (with {letter!r}): convert the file to UTF-8, or set "
        "data.train.encoding=cp1252"
    )


def _raw_lines(path: str, form: TextFormat) -> Iterator[Line]:
    """Lines in UTF-8 with their numbers, from 1; blank ones are left out."""
    number = 0
    try:
        with _open(path) as stream:
            lines = stream if form.is_utf8 else _recoded(stream, form.encoding)
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line
    except UnicodeError as error:
        raise DataError(
            f"{path} is not {form.encoding} text after line {number} ({getattr(error, 'reason', error)}); "
            "correct data.train.encoding"
        ) from None
    except (EOFError, zlib.error, OSError) as error:
        if reason := getattr(error, "strerror", None):
            raise DataError(f"{path} cannot be read after line {number} ({reason})") from None
        # what decompression raises, of gzip and pyarrow alike, says no error of the system
        raise DataError(
            f"{path} is damaged after line {number} ({first_line(error)}); "
            "restore the file, it may be a broken download"
        ) from None


def _recoded(stream: IO[bytes], encoding: str) -> Iterator[bytes]:
    with io.TextIOWrapper(stream, encoding=encoding, newline="\n") as text:
        for line in text:
            yield line.encode()


def _open(path: str) -> IO[bytes]:
    file = Path(path).expanduser()
    if path.lower().endswith(".gz"):
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if path.lower().endswith(".zst"):
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(file), compression="zstd"))
    return file.open("rb")


def _json_lines(path: str, form: TextFormat) -> Iterator[Line]:
    """JSON lines as they are; the rows of a file that is one or several JSON documents over many lines."""
    document = _document(path, form)
    if document is None:
        yield from _raw_lines(path, form)
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


def _document(path: str, form: TextFormat) -> list[Any] | None:
    """The rows of an array, an object, or objects behind each other; None if the file is none of these."""
    start = list(islice(_raw_lines(path, form), 2))
    if not start or not _may_be_document(start):
        return None
    with _open(path) as stream:
        content = stream.read(MOST_DOCUMENT_BYTES + 1)
    if len(content) > MOST_DOCUMENT_BYTES:
        raise DataError(f"{path} is one large JSON document; write one object per line, e.g. with: jq -c '.[]'")
    try:
        text = content.decode("utf-8-sig" if form.is_utf8 else form.encoding).strip()
        decoder = json.JSONDecoder()
        values, place = [], 0
        while place < len(text):
            value, end = decoder.raw_decode(text, place)
            values.append(value)
            place = _SPACE.match(text, end).end()  # type: ignore[union-attr]
    except (ValueError, RecursionError):
        return None
    return values[0] if len(values) == 1 and isinstance(values[0], list) else values


def _csv_lines(path: str, form: TextFormat) -> Iterator[Line]:
    """Rows of a table whose first line names the columns, as JSON objects of texts; a number is a row's last line."""
    csv.field_size_limit(2**31 - 1)
    lines = (_decoded(path, *line) for line in _all_lines(path, form))
    first = next(lines, "")
    reader = csv.DictReader(chain([first], lines), delimiter=_delimiter(path, first, form), strict=True)
    try:
        for row in reader:
            if None in row:
                row = {"more cells than the first line names": row.pop(None)}
            yield reader.line_num, json.dumps(row).encode()
    except csv.Error as error:
        place = f"{path} line {reader.reader.line_num}"
        raise DataError(f"{place}: the table is broken ({error}); correct the file") from None


def _delimiter(path: str, first: str, form: TextFormat) -> str:
    """What was set; else the usual one, unless the first line holds only another."""
    if form.delimiter is not None:
        return "\t" if form.delimiter == "tab" else form.delimiter
    usual = "\t" if uncompressed_name(path).endswith(".tsv") else ","
    held = [one for one in _DELIMITERS if _cells(first, one) > 1]
    if usual in held or not held:
        return usual
    if len(held) > 1:
        found = ", ".join("tab" if one == "\t" else f"'{one}'" for one in held)
        raise DataError(f"{path}: the first line may be split at {found}; set data.train.delimiter to the right one")
    return held[0]


def _cells(line: str, delimiter: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=delimiter), []))
    except csv.Error:  # a line break within quotes, which is no cell more
        return 0


def _all_lines(path: str, form: TextFormat) -> Iterator[Line]:
    """Lines with their numbers; blank ones, too, as a quoted text may hold them."""
    before = 0
    for number, line in _raw_lines(path, form):
        yield from ((blank, b"\n") for blank in range(before + 1, number))
        yield number, line
        before = number


def _decoded(path: str, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} line {number} is not UTF-8 text ({error.reason} at byte {error.start}); {_meant_encoding(line)}"
        ) from None
