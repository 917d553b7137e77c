"""Where a run's metrics and sampled answers go: `metrics.jsonl` (every step), `samples.jsonl`, and trackers.

`metrics.jsonl` holds one JSON object per line: `step` (finished optimizer steps, from 1), `time` (unix seconds)
and the metrics in the order given. Validation writes its own line with the same step and the prefix `val/`.
JSON has no number for values that are not finite; they are written as the strings "NaN", "Infinity" and
"-Infinity", which Python's `float()` and JavaScript's `Number()` turn back.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_lmpo.config.schema import LoggingConfig
from nemo_lmpo.errors import TrainingError, counted
from nemo_lmpo.monitor.observer import Harmless
from nemo_lmpo.monitor.samples import Sample
from nemo_lmpo.monitor.trackers import Trackers
from nemo_lmpo.runtime import run_files
from nemo_lmpo.runtime.files import replace_file

# A killed process loses nothing that was flushed; only a machine that dies needs fsync. Once in a few seconds
# keeps that loss small without making fast steps wait for the disk.
_SYNC_SECONDS = 5.0

_logger = logging.getLogger(__name__)


def encode_number(value: float) -> float | str:
    """The JSON form of a metric: the number, or a string for values that are not finite."""
    number = float(value)
    return number if math.isfinite(number) else json.dumps(number)


def _entry(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None for one that is broken."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def cut_lines(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Remove the lines of steps after ``last_step`` and broken ones, by one atomic rename.

    Returns:
        What the lines of exactly ``last_step`` hold: these are not to be written again.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    kept: list[bytes] = []
    last: list[dict[str, Any]] = []
    broken = 0
    for line in content.splitlines(keepends=True):
        entry = _entry(line)
        if entry is None:
            broken += 1
        elif entry["step"] <= last_step:
            kept.append(line)
            if entry["step"] == last_step:
                last.append(entry)
    if broken:
        _logger.warning("%s: removed %s, as an interrupted write leaves them", path, counted(broken, "broken line"))
    remaining = b"".join(kept)
    if remaining != content:
        replace_file(path, remaining)
    return last


def truncate_metrics(path: Path, resume_step: int) -> set[str]:
    """Remove the lines of steps after ``resume_step`` and broken ones, by one atomic rename.

    Returns:
        The prefixes that lines of exactly ``resume_step`` have: these are not to be written again.
    """
    last = cut_lines(path, resume_step)
    return {"val/" if any(name.startswith("val/") for name in entry) else "" for entry in last}


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(f"cannot write {path} ({error}); free the disk and resume the run") from error


class MetricsLog:
    """Writes metrics; to be made on global rank 0 only.

    A resumed run leaves a file as if it had never been interrupted: lines after the step it resumes from are
    removed, and a line that the resume step already has is not written twice.
    """

    def __init__(
        self,
        run_dir: Path | str,
        config: LoggingConfig,
        *,
        settings: Mapping[str, Any],
        resume_step: int,
        total_steps: int | None = None,
    ) -> None:
        """Open all sinks.

        Args:
            run_dir: the run's directory, made if missing.
            config: which trackers, and how often they get a line.
            settings: the resolved configuration, which trackers show.
            resume_step: finished steps of the checkpoint that is resumed; 0 for a new run.
            total_steps: steps of the whole run, kept in `run.json` for the report.

        Raises:
            ConfigError: a tracker is configured but missing, or cannot start.
        """
        self._run_dir = Path(run_dir)
        self._log_interval = max(1, config.log_interval)
        self._resume_step = resume_step
        # First: what is missing is refused before anything is written.
        self._trackers = Trackers(self._run_dir, config, settings=settings, resume_step=resume_step)
        self._facts: dict[str, Any] = {} if total_steps is None else {"total_steps": total_steps}
        self._write_facts()
        self._path = self._run_dir / run_files.METRICS
        self._present = truncate_metrics(self._path, resume_step)
        self._samples_path = self._run_dir / run_files.SAMPLES
        self._showing_samples = Harmless(
            f"writing {self._samples_path}", instead="free the disk, or set logging.samples=0"
        )
        # The answers of the start model stand at step 0, which a run that begins anew takes again.
        self._has_samples = bool(cut_lines(self._samples_path, resume_step if resume_step > 0 else -1))
        self._file = self._path.open("ab")
        self._synced_at = time.monotonic()

    def log(self, step: int, metrics: Mapping[str, float], *, prefix: str = "") -> None:
        """Write one line.

        Args:
            step: finished optimizer steps, from 1.
            metrics: values by name, without ``prefix``; those that a run does not have are left out.
            prefix: put in front of every name: `val/` for validation.

        Raises:
            TrainingError: the line cannot be written, for example because the disk is full.
        """
        if step == self._resume_step and prefix in self._present:
            return
        named = {prefix + name: float(value) for name, value in metrics.items()}
        assert not named.keys() & {"step", "time"}, "metrics must not be named step or time"
        entry: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
        entry.update((name, encode_number(value)) for name, value in named.items())
        line = json.dumps(entry, allow_nan=False) + "\n"
        with _writing(self._path):
            # One write a line: a kill can then only cut the last line.
            self._file.write(line.encode())
            self._file.flush()
            if time.monotonic() - self._synced_at >= _SYNC_SECONDS:
                self.sync()
        if prefix or step == 1 or step % self._log_interval == 0:
            self._trackers.log(step, named)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Show the answers of a validation, a line each; ``step`` 0 has the start model's."""
        if step == self._resume_step and self._has_samples:
            return
        entries = [{"step": step, "prompt_index": index, **asdict(sample)} for index, sample in enumerate(samples)]
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        with self._showing_samples, self._samples_path.open("ab", buffering=0) as file:
            # One write: a kill can then only cut the last lines, which a resume takes again.
            file.write(text.encode(errors="replace"))
        self._trackers.log_samples(step, samples)

    def note_early_stop(self, facts: Mapping[str, Any]) -> None:
        """Keep in `run.json`, for the report, why the run is done before its last step, until it is resumed."""
        self._facts["stopped_early"] = dict(facts)
        self._write_facts()

    def note_saving(self, facts: Mapping[str, Any]) -> None:
        """Keep in `run.json`, for the report, what saving took of this process's time."""
        self._facts["saving"] = dict(facts)
        self._write_facts()

    def _write_facts(self) -> None:
        """What the report cannot see in the metrics."""
        if self._facts:
            path = self._run_dir / run_files.RUN_FACTS
            with Harmless(f"writing {path}", instead="the report lacks the number of steps; free the disk"):
                replace_file(path, json.dumps(self._facts).encode() + b"\n")

    def sync(self) -> None:
        """Bring all lines to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced_at = time.monotonic()

    def close(self) -> None:
        """Close all sinks; can be called twice.

        Raises:
            TrainingError: the last lines cannot be written.
        """
        try:
            if not self._file.closed:
                with _writing(self._path):
                    self.sync()
                    self._file.close()
        finally:
            self._trackers.close()
