"""The errors a user can cause; every command prints them as one message, without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave is wrong; the message names it, its value and the remedy."""


class ConfigError(UserError):
    """A configuration field is wrong, unknown, or does not fit another one."""


class DataError(UserError):
    """A preference dataset is missing, malformed, or unusable."""


class CheckpointError(UserError):
    """A checkpoint or model directory is missing, damaged, or of another kind."""


class TrainingError(RuntimeError):
    """Training cannot go on, for example because a loss is not finite."""


def first_line(error: BaseException) -> str:
    """What an exception says, for use within a sentence: one line, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:1000] if lines else type(error).__name__


def shown(value: object, most: int = 80) -> str:
    """Text from outside as it may stand in a message: quoted, printable, in one line, at most ``most`` letters.

    Args:
        value: whatever a file or a user gave.
        most: longest result; what is longer loses its end.
    """
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} nested too deeply"
    text = text if text.isprintable() else ascii(value)
    return text if len(text) <= most else text[: most - 3] + "..."
