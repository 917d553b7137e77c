"""Durations as users write them."""

from __future__ import annotations

import re

from nemo_lmpo.errors import ConfigError


def parse_duration(text: str | None) -> float | None:
    """Seconds of `DD:HH:MM:SS`, `HH:MM:SS` or `MM:SS`; None stays None.

    Raises:
        ConfigError: another form.
    """
    if text is None:
        return None
    if not re.fullmatch(r"\d+(:\d+){1,3}", str(text)):
        raise ConfigError(
            f"trainer.max_time_per_run={text!r} is not a duration; write DD:HH:MM:SS or HH:MM:SS, as '03:45:00'"
        )
    seconds = 0
    for number, unit in zip(reversed(str(text).split(":")), (1, 60, 3600, 86400), strict=False):
        seconds += int(number) * unit
    return float(seconds)
