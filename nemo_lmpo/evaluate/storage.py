"""Files of an evaluation: whole or not there, and logs that lose at most the line that was being written."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from nemo_lmpo.errors import DataError
from nemo_lmpo.runtime.atomic import replace_file


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that nobody sees half of it; directories are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, ensure_ascii=False, indent=1)
    # Servers send halves of surrogate pairs, which UTF-8 does not have; JSON can spell them.
    replace_file(path, re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); remove it and repeat the command") from None


def read_text(path: Path) -> str:
    """Text of a file, unpacked if its name ends in `.gz`.

    Raises:
        DataError: it cannot be read.
    """
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON Lines file that is whole.

    Raises:
        DataError: names the line that is none.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON ({error}); fetch or write the file again") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} is no JSON object; fetch or write the file again")
        rows.append(row)
    return rows


def content_hash(content: Any) -> str:
    """SHA-256 of a value's canonical JSON: the same whatever file form it was read from."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Journal:
    """A JSON Lines file that rows are appended to, each under its key, by any number of threads.

    A process that was killed may leave half a line at the end; it is cut off on opening, and that row is made again.

    Args:
        path: the file; made with its directory if it is not there.
        key: name of the field that tells rows apart; of rows with the same key the last one counts.

    Raises:
        DataError: a line before the last one is damaged.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key
        self.rows: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._recover()
        self._file: IO[bytes] = path.open("ab")

    def _recover(self) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                self.rows[str(row[self.key])] = row
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"{self.path}, line {number} is damaged; remove that line, and its row is made again"
                ) from None
        if len(whole) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row; after the return it outlives the process."""
        self.extend([row])

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows at once."""
        added = [dict(row) for row in rows]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in added)
        with self._lock:
            self._file.write(text.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
            self.rows.update((str(row[self.key]), row) for row in added)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
