"""The state of runs, from the files in their directories and from Slurm's queue."""

from __future__ import annotations

import math
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from nemo_lmpo.errors import ConfigError, UserError, counted
from nemo_lmpo.report.escape import visible
from nemo_lmpo.report.read import Metrics, Run, read_run
from nemo_lmpo.runtime import run_files
from nemo_lmpo.runtime.batch_job import JOB_FILE, OUTCOME_DONE, OUTCOME_REFUSED, JobRecord, read_record
from nemo_lmpo.runtime.files import read_small

_RECENT_STEPS = 50
_PATIENCE = 30.0
_LONGEST = 1e9
"""Seconds (30 years) above which a duration says nothing."""
_COLUMNS = ("run", "state", "step", "loss", "val loss", "training left", "job", "restarts", "job left")
_STATES = {"PENDING": "waiting", "RUNNING": "running", "COMPLETING": "ending", "SUSPENDED": "suspended"}


class QueueEntry(NamedTuple):
    """A job that Slurm has not finished with."""

    state: str
    reason: str
    time_left: str


def show_status(run_dirs: list[Path]) -> str:
    """A table, one line per run.

    Raises:
        ConfigError: a directory is not a run's, or there are no runs.
    """
    found = run_dirs or find_runs(Path("runs"))
    if not found:
        raise ConfigError("there are no runs in ./runs; give their directories")
    rows = [_COLUMNS, *(tuple(describe_run(path)) for path in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *(line for path in found if (line := _hang(path)) is not None)])


def _hang(path: Path) -> str | None:
    """What a run that hung left, unless a step was finished since."""
    stacks = sorted((path / run_files.HANG).glob(f"{run_files.STACKS}*.txt"), key=lambda file: file.stat().st_mtime)
    metrics = path / run_files.METRICS
    if not stacks or (metrics.exists() and metrics.stat().st_mtime > stacks[-1].stat().st_mtime):
        return None
    first = read_small(stacks[0]).decode(errors="replace").split("\n", 1)[0].removeprefix("error: ").split(";")[0]
    ranks = counted(len(stacks), "rank")
    return (
        f"{visible(str(path))}: {visible(first)}; stacks and last collectives of {ranks} are in its {run_files.HANG}/"
    )


def find_runs(root: Path) -> list[Path]:
    """Directories of runs below ``root``, those of sweeps included; the ones with news first."""
    places = [path for pattern in ("*", "*_sweep/*") for path in root.glob(pattern) if _is_run(path)]
    return sorted(places, key=lambda path: -path.stat().st_mtime)


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("metrics.jsonl", JOB_FILE))


def describe_run(path: Path) -> list[str]:
    """The cells of a run's line."""
    if not _is_run(path):
        raise ConfigError(f"{path} is not the directory of a run that has started; give one, such as runs/RECIPE")
    job = read_record(path)
    try:
        run: Run | None = read_run(path)
    except UserError:  # no step finished yet
        run = None
    entry = queue_entry(job.job_id) if job is not None and job.job_id else None
    metrics = run.metrics if run is not None else None
    return [
        visible(str(path)).replace("\n", "\\n"),
        _state(run, job, entry),
        f"{run.metrics.last_step}/{run.total_steps or '?'}" if run is not None else "-",
        _last(metrics, "loss"),
        _last(metrics, "val/loss"),
        _training_left(run),
        "-" if job is None or job.job_id is None else job.job_id,
        "-" if job is None or job.restarts is None else str(job.restarts),
        entry.time_left if entry is not None and entry.state == "RUNNING" else "-",
    ]


def queue_entry(job_id: str) -> QueueEntry | None:
    """What `squeue` says of a job; None if it is not in the queue, or there is no Slurm here."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", f"--jobs={job_id}", "--states=all", "--format=%T|%r|%L"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:  # its controller is away
        return None
    fields = done.stdout.strip().split("\n")[0].split("|")
    if done.returncode or len(fields) != 3 or fields[0] not in _STATES:
        return None
    return QueueEntry(*fields)


def _state(run: Run | None, job: JobRecord | None, entry: QueueEntry | None) -> str:
    if entry is not None:
        # Requeued jobs are held back for a while (BeginTime).
        reason = f" ({entry.reason})" if entry.state == "PENDING" and entry.reason != "None" else ""
        return _STATES[entry.state] + reason
    outcome = job.outcome if job is not None else None
    if outcome == OUTCOME_REFUSED:
        return "failed"
    if outcome == OUTCOME_DONE or (run is not None and run.finished):
        return "done"
    if outcome is not None:
        return outcome
    age = (
        ""
        if run is None or run.metrics.last_time is None
        else f", {_duration(time.time() - run.metrics.last_time)} ago"
    )
    # Without Slurm nobody tells whether it still runs.
    return f"ended{age}" if job and shutil.which("squeue") else f"unknown{age}"


def _last(metrics: Metrics | None, name: str) -> str:
    series = metrics.get(name) if metrics is not None else None
    if series is None:
        return "-"
    value = series.values[-1]
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def _training_left(run: Run | None) -> str:
    """From the newest steps' wall time."""
    seconds = run.metrics.get("step_seconds") if run is not None else None
    if run is None or run.total_steps is None or seconds is None:
        return "-"
    if run.finished:
        return _duration(0)
    left = (run.total_steps - run.metrics.last_step) * statistics.median(seconds.finite().values[-_RECENT_STEPS:])
    return _duration(left)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds) or seconds > _LONGEST:
        return "?"
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86400)
    text = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}-{text}" if days else text
