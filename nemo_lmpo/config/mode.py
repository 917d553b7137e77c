"""What `nemo_lmpo.train` does with a configuration: given among the overrides, but not part of the run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nemo_lmpo.config.coerce import coerce
from nemo_lmpo.errors import ConfigError, shown


@dataclass(frozen=True)
class Mode:
    """Words of the command line that are written like settings."""

    dry_run: bool | Literal["trace", "plan"] = False
    """Validate, print the layout and the expected memory, and exit; `trace` runs a step of the busiest ranks on fake
    tensors, `plan` ranks the layouts that fit `GPUS`."""
    GPUS: str | None = None
    """For `dry_run=plan`: `4`, `64xH100`, `16x4xA100` (nodes x GPUs x card); unset: `trainer.devices` and `num_nodes`
    of A100s."""
    traceback: bool = False
    """Show the full traceback of errors that are otherwise one message."""


MODE_WORDS = tuple(field.name for field in dataclasses.fields(Mode))
_OVERRIDE = re.compile(rf"\s*\+{{0,2}}(?P<word>{'|'.join(MODE_WORDS)})\s*=(?P<value>.*)", re.DOTALL)


def split_mode(overrides: Sequence[str], default: Mode | None = None) -> tuple[Mode, list[str]]:
    """Take the mode off the overrides; the rest are settings of the run.

    Args:
        overrides: of the command line; a word may have Hydra's `+` or `++` in front, and the last one counts.
        default: the mode where no override says otherwise.

    Raises:
        ConfigError: a value that the word cannot have, or `GPUS` without `dry_run=plan`.
    """
    given: dict[str, Any] = {}
    settings: list[str] = []
    for override in overrides:
        found = _OVERRIDE.fullmatch(override)
        if found is None:
            settings.append(override)
            continue
        text = found["value"].strip()
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        given[found["word"]] = text[1:-1] if quoted else text
    # A word that is set to null is one that was not given.
    words = {word: value for word, value in given.items() if value != "null"}
    start = dataclasses.asdict(default or Mode())
    mode: Mode = coerce(Mode, {**start, **words}, unknown=lambda key, _: f"unknown key {key}")
    if mode.GPUS is not None and mode.dry_run != "plan":
        raise ConfigError(
            f"GPUS={mode.GPUS} is for dry_run=plan; to train, set trainer.devices and trainer.num_nodes instead"
        )
    return mode, settings


def without_mode(raw: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Plain settings without the words of a mode, which configurations saved by earlier versions hold, turned off.

    A word that is turned on in a recipe is appended to ``problems``.
    """
    for word in MODE_WORDS:
        if raw.get(word) not in (None, False, "false"):
            problems.append(
                f"{word}={shown(raw[word])} is not a setting of a run; remove it from the recipe, and give it to "
                f"nemo_lmpo.train on the command line"
            )
    return {key: value for key, value in raw.items() if key not in MODE_WORDS}
