"""Text from outside on its way to a terminal or a log: it can neither act on the terminal nor look like our own lines.

Log records pass here on their way out (:func:`printable_record`), and so do the messages of errors and answers. What is
put into a log message is one line, unless it is of :class:`Lines`, which our own code makes line by line.
"""

from __future__ import annotations

import logging
from pathlib import PurePath

from nemo_lmpo.errors import Lines, printable, printable_lines

_LONGEST_LINE = 100_000
_OURS = "nemo_lmpo"
_TEXTS = (str, bytes, bytearray, BaseException, PurePath, list, tuple, dict, set, frozenset)


def printable_record(record: logging.LogRecord) -> str:
    """The message of a log record as it may be shown.

    Raises:
        TypeError, ValueError, KeyError: its arguments do not fit the message.
    """
    message = str(record.msg)
    if record.args:
        given = record.args
        message %= (
            {name: _line(value) for name, value in given.items()}
            if isinstance(given, dict)
            else tuple(_line(value) for value in given)
        )
    own = record.name == _OURS or record.name.startswith(f"{_OURS}.") or record.name == "__main__"
    first, *rest = printable_lines(message).split("\n")
    # What libraries put together themselves may hold lines of data.
    return "\n".join([first, *(line if own or not line else f"  {line}" for line in rest)])


def _line(value: object) -> object:
    if isinstance(value, Lines) or not isinstance(value, _TEXTS):
        return value
    return printable(str(value), _LONGEST_LINE)
