"""Answers kept as they come: in a journal beside the output, from which the same command resumes."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from nemo_lmpo.answers.journal import Journal
from nemo_lmpo.errors import ConfigError, DataError, shown
from nemo_lmpo.runtime.files import replace_file

SUFFIX = ".partial"
"""The journal's name is the output's with this ending."""
_KEY, _SETTINGS = "index", "settings"

OutputLine = Mapping[str, Any]
"""One line of the output: `prompt`, `response`, `tokens`, `finished`."""


class Keeper(Protocol):
    """Where answers go; a context that is left when all are there, or at an error."""

    done: set[int]
    """Prompts that are answered, by index."""

    def keep(self, rows: Mapping[int, OutputLine]) -> None:
        """Take answers by the index of their prompts."""

    def finish(self) -> None:
        """All are there: make them the output."""

    def interrupted(self) -> str:
        """What is left after an interruption, as a sentence."""

    def __enter__(self) -> Keeper: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def checked_output(output: Path, prompts: Path) -> Path:
    """Where the output is written: the path itself, or what it links to.

    Raises:
        ConfigError: it cannot be written there.
    """
    target = output.resolve()
    folder = target.parent
    if not folder.is_dir():
        raise ConfigError(f"--output {output}: its directory does not exist; make it first")
    if target.exists() and not target.is_file():
        raise ConfigError(f"--output {output} is not a regular file; choose another path")
    if target.exists() and target.samefile(prompts):
        raise ConfigError(f"--output {output} is the file of the prompts; choose another path")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"--output {output}: its directory cannot be written ({error.strerror}); choose another one"
        ) from None
    return target


class FileKeeper:
    """Keeps answers in a file beside the output, each on disk before the next batch begins.

    Args:
        output: as :func:`checked_output` returned it.
        settings: what decides the answers; a journal of other settings is not continued.
        count: prompts in all.

    Raises:
        ConfigError: the journal is of another command, or in use.
        DataError: it is damaged, or cannot be written.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], count: int) -> None:
        self._output, self._count = output, count
        self._path = output.with_name(output.name + SUFFIX)
        self._journal = Journal(self._path, _KEY)
        try:
            self._claim(json.loads(json.dumps(settings)))
        except BaseException:
            self._journal.close()
            raise
        self.done = {int(index) for index in self._journal.rows if index != _SETTINGS}

    def _claim(self, wanted: Mapping[str, Any]) -> None:
        """Note what the answers are made with, or see that it is the same as before."""
        if not self._journal.rows:
            self._journal.append({_KEY: _SETTINGS, **wanted})
            return
        self._compare(self._journal.rows.get(_SETTINGS, {}), wanted)
        places = [index for index in self._journal.rows if index != _SETTINGS]
        if not all(index.isdecimal() and int(index) < self._count for index in places):
            raise DataError(f"{self._path} is damaged; remove it, and all answers are made again")

    def _compare(self, before: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        names = [name for name in {**wanted, **before} if name != _KEY and before.get(name) != wanted.get(name)]
        if names:
            was, now = shown(before.get(names[0])), shown(wanted.get(names[0]))
            raise ConfigError(
                f"{self._path} keeps answers of an interrupted command with {names[0]} {was}, this one has {now}; "
                "repeat that command, choose another --output, or remove the file to start anew"
            )

    def keep(self, rows: Mapping[int, OutputLine]) -> None:
        """Append answers to the journal."""
        self._journal.extend({_KEY: index, **row} for index, row in rows.items())
        self.done.update(rows)

    def finish(self) -> None:
        """Write the output in the order of the prompts, then remove the journal."""
        kept = self._journal.rows
        rows = [{name: value for name, value in kept[str(i)].items() if name != _KEY} for i in range(self._count)]
        replace_file(self._output, "".join(_line(row) for row in rows))
        self._path.unlink()

    def interrupted(self) -> str:
        """Where the answers are."""
        # Counted in the file: the interruption may have come between a batch's writing and its noting.
        kept = self._path.read_bytes().count(b"\n") - 1
        return f"{kept} of {self._count} answers are in {self._path}; the same command resumes"

    def __enter__(self) -> FileKeeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.close()


class Printer:
    """Prints answers in the order of the prompts, each as soon as those before it are there."""

    def __init__(self, count: int) -> None:
        self.done: set[int] = set()
        self._rows: dict[int, OutputLine] = {}
        self._count, self._printed = count, 0

    def keep(self, rows: Mapping[int, OutputLine]) -> None:
        """Print what is next."""
        self.done.update(rows)
        self._rows.update(rows)
        ready = []
        while self._printed in self._rows:
            ready.append(self._rows.pop(self._printed))
            self._printed += 1
        _print(ready)

    def finish(self) -> None:
        """Everything is printed."""

    def interrupted(self) -> str:
        """Where the answers are."""
        return f"{len(self.done)} of {self._count} answers are printed; with --output FILE the same command resumes"

    def __enter__(self) -> Printer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an interruption, answers whose turn had not come.
        _print([self._rows[index] for index in sorted(self._rows)])


def _line(row: OutputLine, *, ascii_only: bool = False) -> str:
    return json.dumps(row, ensure_ascii=ascii_only) + "\n"


def _print(rows: Iterable[OutputLine]) -> None:
    """Write lines to standard output; what its encoding has no character for is written as JSON escapes."""
    for row in rows:
        line = _line(row)
        try:
            line.encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError:
            line = _line(row, ascii_only=True)
        sys.stdout.write(line)
    sys.stdout.flush()
