"""What a checkpoint holds besides tensors, and how it is read back from a file that may be damaged."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from nemo_lmpo.errors import CheckpointError, shown
from nemo_lmpo.loss.running_statistics import RunningStatistics
from nemo_lmpo.runtime import run_files
from nemo_lmpo.runtime.files import read_small

FORMAT_VERSION = 2
"""Of checkpoints: 1 had sizes only and no version; 2 added checksums, the data's fingerprints and this number."""


class DamageError(Exception):
    """A file of a checkpoint is not what was written; the message says which, on one line."""


@dataclass
class Progress:
    """What must survive besides tensors."""

    step: int = 0
    """Finished optimizer steps."""
    statistics: dict[str, Any] | None = None
    """State of the running margin statistics."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics when it was saved, validation ones included; `checkpoint.monitor` ranks by them."""
    layout: dict[str, int] = field(default_factory=dict)
    """Sizes of the parallel groups that wrote it."""
    save_seconds: float = 0.0
    """How long the last save took; a resumed run reserves as much before its time limit."""
    data: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the training and validation pairs; empty in checkpoints of version 1."""
    base: str = ""
    """Hash of the weights that the checkpoint's adapters belong to; empty where it holds whole weights."""
    best: float | None = None
    """Best `checkpoint.monitor` of a validation so far; None: no validation yet."""
    without_better: int = 0
    """Validations since, for early stopping."""
    version: int = FORMAT_VERSION


def check_version(version: object, directory: Path) -> None:
    """Refuse what a newer version of the package wrote.

    Raises:
        CheckpointError: with the remedy.
        DamageError: no version number.
    """
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise DamageError(f"its version is {shown(version)}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {directory} has format {version}, and this version of nemo_lmpo reads up to {FORMAT_VERSION}; "
            f"update nemo_lmpo, or choose another run_dir"
        )


def read_train_state(directory: Path, step: int) -> Progress:
    """The progress of the checkpoint of ``step``.

    Raises:
        DamageError: it is not readable, lacks something, or belongs to another step.
        CheckpointError: a newer version of the package wrote it.
        OSError: the file cannot be read.
    """
    try:
        values = json.loads(read_small(directory / run_files.PROGRESS))
    except (ValueError, RecursionError):
        raise DamageError(f"{run_files.PROGRESS} is not readable") from None
    if not isinstance(values, dict):
        raise DamageError(f"{run_files.PROGRESS} holds no settings")
    check_version(values.setdefault("version", 1), directory)
    known = {entry.name for entry in fields(Progress)}
    unknown, missing = sorted(values.keys() - known), sorted(_ALWAYS - values.keys())
    if unknown or missing:
        what = f"has {shown(unknown[0])}, which is unknown" if unknown else f"lacks {missing[0]!r}"
        raise DamageError(f"{run_files.PROGRESS} {what}")
    state = Progress(**values)
    for name, good in _CHECKS.items():
        if not good(getattr(state, name)):
            raise DamageError(f"{run_files.PROGRESS} has {name}={shown(getattr(state, name))}")
    if state.step != step:
        raise DamageError(f"{run_files.PROGRESS} is of step {state.step}")
    return state


def find_missing_statistics(own: RunningStatistics | None, state: Progress) -> str | None:
    """What is wrong with a checkpoint's margin statistics for a run that keeps ``own``; None: nothing.

    Raises:
        CheckpointError: they are of another kind.
    """
    if own is None:
        return None
    if state.statistics is None:
        return f"{run_files.PROGRESS} has no margin statistics"
    numbers = [value for name, value in state.statistics.items() if name != "kind"]
    if not numbers or not all(_is_number(value) and math.isfinite(value) for value in numbers):
        return f"{run_files.PROGRESS} has margin statistics that are not numbers"
    RunningStatistics(own.config).load_state_dict(state.statistics)
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _holds(values: object, good: Any) -> bool:
    return isinstance(values, dict) and all(good(value) for value in values.values())


_ALWAYS = {"step", "statistics", "metrics", "layout", "save_seconds"}
"""What every version wrote; fields that came later have their defaults in older checkpoints."""
_CHECKS: dict[str, Any] = {
    "step": _is_count,
    "statistics": lambda value: value is None or isinstance(value, dict),
    "metrics": lambda value: _holds(value, _is_number),
    "layout": lambda value: _holds(value, _is_count),
    "save_seconds": lambda value: _is_number(value) and value >= 0,
    "data": lambda value: _holds(value, lambda text: isinstance(text, str)),
    "base": lambda value: isinstance(value, str),
}
