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
