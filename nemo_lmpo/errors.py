"""The errors a user can cause, and what their messages may show: no credentials, one printable line.

Every command prints these errors as one message, without a traceback.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from urllib.parse import unquote, urlsplit

HIDDEN = "***"
"""Stands in messages for a credential."""
_SECRET_VARIABLE = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE)$", re.IGNORECASE)
_ADDRESS_VARIABLE = re.compile(r"(?:PROXY|UR[IL]|DSN|ENDPOINT|HOST|SERVER|ADDRESS)$", re.IGNORECASE)
_SHORTEST_SECRET, _SHORTEST_IN_ENVIRONMENT = 6, 8
"""Shorter values are not looked for: they stand in ordinary text, too."""
# Lengths are bounded, so that no text takes more than linear time.
_USER_INFO = re.compile(
    r"""(?<=://)[^\s/?#]{0,999}@|(?<![\w/@.:-])[^\s/:@"'=]{1,99}:[^\s/@]{1,500}@(?=[\w.-]{1,255}(?::\d|/|$))"""
)
_QUERY_VALUE = re.compile(r"""(?<=[?&;])([\w.~%\[\]-]{1,99}=)[^\s&;#"'<>)]+""")
_AUTHORIZATION = re.compile(r"""\b((?:Bearer|Basic)\s+)[^\s"',;]+""", re.IGNORECASE)
_LONGEST_LINE = 100_000
_MOST_LOOKED_AT = 10_000
"""Characters and values that are written out to be cut then."""
_remembered: set[str] = set()


def remember_secret(*values: str | None) -> None:
    """Let no message of this process show these values, wherever they come up."""
    _remembered.update(value for value in values if value and len(value) >= _SHORTEST_SECRET)


def without_secrets(text: str) -> str:
    """A text with `***` for every credential that is known or that its place gives away.

    Known are the values of variables such as `OPENAI_API_KEY` and what :func:`remember_secret` was given; places are
    the user part and the query of an address, and what follows `Bearer`.
    """
    for secret in sorted(_remembered | _secrets_of_environment(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _USER_INFO.sub(f"{HIDDEN}@", text)
    text = _AUTHORIZATION.sub(rf"\g<1>{HIDDEN}", text)
    return _QUERY_VALUE.sub(rf"\g<1>{HIDDEN}", text)


def _secrets_of_environment() -> set[str]:
    found: set[str] = set()
    for name in list(os.environ):
        if _SECRET_VARIABLE.search(name):
            found.add(os.environ.get(name, ""))
        elif _ADDRESS_VARIABLE.search(name) and "@" in (value := os.environ.get(name, "")):
            found |= _passwords(value)
    return {value for value in found if len(value) >= _SHORTEST_IN_ENVIRONMENT}


def _passwords(url: str) -> set[str]:
    """As it stands in an address, and as it is meant."""
    try:
        password = urlsplit(url).password or ""
    except ValueError:
        return set()
    return {password, unquote(password)}


class Lines(str):
    """A text of several lines that our own code laid out; values from outside in it are lines already."""


def one_per_line(texts: Iterable[str]) -> Lines:
    """Texts under each other, each printable and on a line of its own; :class:`Lines` stay as many as they are."""
    return Lines("\n".join(_printable_message(text) for text in texts))


def printable_lines(text: str, indent: str = "") -> str:
    """The text with everything spelled out that is not printable but line feeds and tabs.

    Args:
        text: of any number of lines.
        indent: before each line, as before those of data, which then cannot be taken for ours.
    """
    lines = (printable(line.expandtabs(), _LONGEST_LINE) for line in text.split("\n"))
    return "\n".join(indent + line for line in lines)


def _printable_message(message: object) -> Lines:
    text = str(message)
    return Lines(printable_lines(text) if isinstance(message, Lines) else printable(text, _LONGEST_LINE))


class UserError(ValueError):
    """Something the user gave is wrong; the message names it, its value and the remedy.

    The message is one printable line, whatever values stand in it, unless it is of :class:`Lines`.
    """

    def __init__(self, message: str = "", *more: object) -> None:
        super().__init__(_printable_message(message), *more)

    def __str__(self) -> Lines:
        """The message, without credentials."""
        return Lines(without_secrets(self.args[0]))


class ConfigError(UserError):
    """A configuration field is wrong, unknown, or does not fit another one."""


class DataError(UserError):
    """A preference dataset is missing, malformed, or unusable."""


class CheckpointError(UserError):
    """A checkpoint or model directory is missing, damaged, or of another kind."""


class TrainingError(RuntimeError):
    """Training cannot go on, for example because a loss is not finite; one printable line, as :class:`UserError`."""

    def __init__(self, message: str = "", *more: object) -> None:
        super().__init__(_printable_message(message), *more)

    def __str__(self) -> Lines:
        """The message, without credentials."""
        return Lines(without_secrets(self.args[0]))


def first_line(error: BaseException) -> str:
    """What an exception says, for use within a sentence: one line, or its kind where it says nothing."""
    lines = without_secrets(str(error)).strip().splitlines()
    return lines[0][:1000] if lines else type(error).__name__


def printable(text: str, most: int = 1000) -> str:
    """A text as it may stand on a line of a terminal: what is not printable spelled out, at most ``most`` characters.

    Escape sequences, line breaks and marks that turn the direction of text would forge lines or act on the terminal.
    """
    text = text[: most + 1] if len(text) > most else text
    if not text.isprintable():
        text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return text if len(text) <= most else text[: most - 3] + "..."


def shown(value: object, most: int = 80) -> str:
    """Text from outside as it may stand in a message: quoted, printable, in one line, at most ``most`` letters.

    Args:
        value: whatever a file or a user gave.
        most: longest result; what is longer loses its end.
    """
    if not _is_small(value):
        value = _start_of(value)
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
        text = text if text.isprintable() else ascii(value)
    except (RecursionError, ValueError):  # Python writes out no number of more than 4300 digits
        text = f"a {type(value).__name__} that is too large to show"
    # Before it is cut: of half a credential nothing tells what it is.
    text = without_secrets(text)
    return text if len(text) <= most else text[: most - 3] + "..."


def counted(number: int, noun: str) -> str:
    """A number with its noun, as `1 process` and `2 processes`."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith(('s', 'x', 'ch')) else 's'}"


def nearest(given: str, known: Iterable[str], likeness: float = 0.7) -> str | None:
    """The known name that is most like the given one; None where none is.

    Args:
        given: what the user wrote.
        known: what could have been meant.
        likeness: least ratio of equal letters, from 0 to 1 (:meth:`difflib.SequenceMatcher.ratio`).
    """
    import difflib

    return next(iter(difflib.get_close_matches(given, list(known), n=1, cutoff=likeness)), None)


def did_you_mean(given: str, known: Iterable[str], before: str = "") -> str:
    """How a sentence about an unknown name ends: `; did you mean NAME?`, or a full stop where no name is near.

    Args:
        given: what the user wrote.
        known: what could have been meant.
        before: what is put before the name, as `loss.name=`.
    """
    near = nearest(given, known)
    return "." if near is None else f"; did you mean {before}{near}?"


def _is_small(value: object) -> bool:
    """Whether the text of a value is of a sensible size: a kilobyte of YAML can hold a list that fills the memory."""
    waiting, room = [value], _MOST_LOOKED_AT
    while waiting and room > 0:
        value = waiting.pop()
        room -= 1
        if isinstance(value, str | bytes | bytearray):
            room -= len(value)
        elif isinstance(value, Mapping):
            room -= len(value)
            waiting.extend(part for pair in islice(value.items(), max(room, 0)) for part in pair)
        elif isinstance(value, list | tuple | set | frozenset):
            room -= len(value)
            waiting.extend(islice(value, max(room, 0)))
    return room > 0


def _start_of(value: object) -> object:
    """Of a text its start; of anything else what it is."""
    return value[:_MOST_LOOKED_AT] if isinstance(value, str | bytes) else _Unshown(type(value).__name__)


class _Unshown:
    """Stands for a value of which nothing is shown but its type."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return f"a {self.kind} that is too large to show"
