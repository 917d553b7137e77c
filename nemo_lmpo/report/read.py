"""Read what a run directory says about its run."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_lmpo.errors import UserError, counted, first_line
from nemo_lmpo.runtime import run_files
from nemo_lmpo.runtime.files import read_small

VALIDATION = "val/"
_MOST_STEPS = 2**53
"""Steps beyond are none: they do not fit a float."""
_LATEST = 2.0**36
"""Unix seconds of the year 4147; later times are none."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Series:
    """One metric over the run, by rising step; values may be NaN or infinite."""

    steps: list[int]
    values: list[float]

    def finite(self) -> Series:
        """Without values that are not finite."""
        kept = [(step, value) for step, value in zip(self.steps, self.values, strict=True) if math.isfinite(value)]
        return Series([step for step, _ in kept], [value for _, value in kept])


@dataclass(frozen=True)
class Metrics:
    """All metrics of a run; names as logged, validation with the prefix `val/`."""

    series: dict[str, Series]
    last_step: int
    last_time: float | None = None
    """Unix seconds of the newest line."""

    def get(self, name: str) -> Series | None:
        """The metric, or None if the run has no finite value of it."""
        found = self.series.get(name)
        return found if found is not None and found.finite().steps else None


@dataclass(frozen=True)
class EarlyStop:
    """Why a run is done before its last step."""

    step: int
    monitor: str
    best: float | None
    without_better: int
    """Validations since the best one."""


@dataclass(frozen=True)
class Saving:
    """What saving took of the newest process's time."""

    checkpoints: int
    seconds: float
    """That training waited."""
    share: float
    """Of the time since training began."""
    bytes: int
    write_seconds: float


@dataclass(frozen=True)
class Run:
    """A run to report on."""

    label: str
    metrics: Metrics
    config: Mapping[str, Any] = field(default_factory=dict)
    total_steps: int | None = None
    early_stop: EarlyStop | None = None
    saving: Saving | None = None

    @property
    def finished(self) -> bool | None:
        """Whether nothing is left to do; None if the number of steps is not known."""
        if self.early_stop is not None:
            return True
        return None if self.total_steps is None else self.metrics.last_step >= self.total_steps


def _entry(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and _is_count(entry.get("step")) else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_STEPS


def _number(value: Any) -> float | None:
    # Values that are not finite are logged as strings; null is what other writers use.
    if value is None:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def read_metrics(path: Path) -> Metrics:
    """Read a `metrics.jsonl`.

    Broken lines are passed over (a run that is being written, or was killed, may end in one), and of several
    values of a metric at one step the last counts.

    Raises:
        UserError: no such file, or no metrics in it.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the directory of a run that has finished a step")
    columns: dict[str, dict[int, float]] = {}
    last_step, last_time, broken = 0, None, 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            entry = _entry(line)
            if entry is None:
                broken += 1
                continue
            step = entry.pop("step")
            now = _number(entry.pop("time", None))
            last_time = now if now is not None and 0 < now <= _LATEST else last_time
            last_step = max(last_step, step)
            for name, value in entry.items():
                number = _number(value)
                if number is not None:
                    columns.setdefault(name, {})[step] = number
    if broken:
        _logger.warning("%s: passed over %s", path, counted(broken, "broken line"))
    if not columns:
        raise UserError(f"{path} has no metrics; a report needs a run that has finished a step")
    series = {}
    for name, values in columns.items():
        steps = sorted(values)
        series[name] = Series(steps, [values[step] for step in steps])
    return Metrics(series, last_step, last_time)


def read_config(run_dir: Path) -> dict[str, Any]:
    """The run's `config.yaml`; empty if it is missing or cannot be read."""
    path = run_dir / run_files.CONFIG
    if not os.path.lexists(path):
        return {}
    from nemo_lmpo.runtime.safe_yaml import load_yaml  # here, so that a wrong run directory is answered at once

    try:
        loaded = load_yaml(read_small(path))
    except (OSError, ValueError) as error:
        _logger.warning("%s cannot be read (%s); continuing without the run's settings", path, first_line(error))
        return {}
    return {str(key): value for key, value in loaded.items()} if isinstance(loaded, dict) else {}


def read_facts(path: Path) -> dict[str, Any]:
    """The object in a JSON file such as `run.json`; empty if it is missing or cannot be read."""
    try:
        found = json.loads(read_small(path, most=2**24))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _total_steps(facts: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
    total = facts.get("total_steps")
    if total is None:
        trainer = config.get("trainer")
        total = trainer.get("max_steps") if isinstance(trainer, Mapping) else None
    return total if _is_count(total) else None


def _early_stop(facts: Mapping[str, Any], last_step: int) -> EarlyStop | None:
    """The reason, unless the run went on since."""
    try:
        found = EarlyStop(**facts["stopped_early"])
    except (KeyError, TypeError):
        return None
    counts = _is_count(found.step) and _is_count(found.without_better)
    best = found.best is None or (isinstance(found.best, int | float) and _number(found.best) is not None)
    return found if counts and best and isinstance(found.monitor, str) and found.step == last_step else None


def _saving(facts: Mapping[str, Any]) -> Saving | None:
    """What `run.json` says of saving, where it is what a run writes."""
    try:
        found = Saving(**facts["saving"])
    except (KeyError, TypeError):
        return None
    counts = _is_count(found.checkpoints) and _is_count(found.bytes)
    numbers = (found.seconds, found.share, found.write_seconds)
    plain = all(isinstance(value, int | float) and 0 <= value < math.inf for value in numbers)
    return found if counts and plain and found.checkpoints else None


def read_run(run_dir: Path, label: str | None = None) -> Run:
    """Read a run directory; ``label`` is the recipe's name by default.

    Raises:
        UserError: no such directory, or no metrics in it.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a directory; give the directory of a run, such as runs/RECIPE")
    metrics = read_metrics(run_dir / run_files.METRICS)
    config = read_config(run_dir)
    name = label or str(config.get("name") or run_dir.resolve().name)
    facts = read_facts(run_dir / run_files.RUN_FACTS)
    early_stop = _early_stop(facts, metrics.last_step)
    return Run(name, metrics, config, _total_steps(facts, config), early_stop, _saving(facts))
