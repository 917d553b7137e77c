"""The batch job that a process runs in, from the variables of Slurm and of the templates in `slurm/`. Imports no torch.

A small file tells the batch script how the run ended: it is done, it was stopped and is to be resumed, or it was
refused and would be refused again. Exit statuses cannot tell: launchers replace them with their own.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_lmpo.runtime.files import read_small, replace_file

JOB_FILE = "job.json"
OUTCOME_DONE = "done"
OUTCOME_REFUSED = "refused"
_DEFAULT_MARGIN = 60.0
_JOB_NAME = re.compile(r"[0-9]{1,12}(_[0-9]{1,12})?")


@dataclass(frozen=True)
class BatchJob:
    """A Slurm job."""

    job_id: str
    """Its name for Slurm's commands: NUMBER, or ARRAY_TASK in an array, since its last task has its number."""
    restarts: int = 0
    """How often Slurm has started the job again."""
    ends_at: float | None = None
    """Unix time of the job's time limit; None: no limit, or not known."""
    margin_seconds: float = _DEFAULT_MARGIN
    """Kept free before the end, besides a step and a save."""
    directory: Path | None = None
    """Where the batch script looks for what became of the run; None without the templates."""

    @property
    def stop_at(self) -> float | None:
        """Unix time at which everything must be saved."""
        return None if self.ends_at is None else self.ends_at - self.margin_seconds

    def record(self, run_dir: Path) -> None:
        """Note in the run's directory that this job works on it, and for the batch script where that is.

        Call on one rank.
        """
        replace_file(run_dir / JOB_FILE, json.dumps(asdict(self), default=str) + "\n")
        if self.directory is not None:
            replace_file(self.directory / "run_dir", f"{run_dir.resolve()}\n")


def read_batch_job(environ: Mapping[str, str] | None = None) -> BatchJob | None:
    """The job of this process, or None outside of Slurm."""
    environ = os.environ if environ is None else environ
    job_id = environ.get("SLURM_JOB_ID")
    if not job_id:
        return None
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        job_id = f"{array}_{task}"
    directory = environ.get("NEMO_LMPO_JOB_DIR")
    end = _end(environ)
    margin = _number(environ.get("NEMO_LMPO_MARGIN_SECONDS"))
    return BatchJob(
        job_id,
        restarts=int(_number(environ.get("SLURM_RESTART_COUNT")) or 0),
        ends_at=end[1] if end is not None and end[1] > time.time() else None,
        margin_seconds=_DEFAULT_MARGIN if margin is None else max(margin, 0.0),
        directory=Path(directory) if directory else None,
    )


@dataclass(frozen=True)
class JobRecord:
    """The job that worked on a run last, from what :meth:`BatchJob.record` left; odd values count as missing."""

    job_id: str | None = None
    restarts: int | None = None
    outcome: str | None = None
    """`done`, `refused` or `stopped REASON`; None: it runs, or was killed."""


def read_record(run_dir: Path) -> JobRecord | None:
    """The job that worked on a run last; None if there was none, or its record cannot be read."""
    try:
        found = json.loads(read_small(run_dir / JOB_FILE))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    job_id, restarts, directory = (found.get(name) for name in ("job_id", "restarts", "directory"))
    return JobRecord(
        job_id if isinstance(job_id, str) and _JOB_NAME.fullmatch(job_id) else None,
        restarts if type(restarts) is int and 0 <= restarts < 2**31 else None,
        _read_outcome(Path(directory)) if isinstance(directory, str) and directory else None,
    )


def _read_outcome(directory: Path) -> str | None:
    try:
        outcome = read_small(directory / "outcome", most=200).decode().strip()
    except (OSError, UnicodeDecodeError):
        return None
    known = outcome in (OUTCOME_DONE, OUTCOME_REFUSED) or re.fullmatch(r"stopped [A-Za-z0-9 ]+", outcome)
    return outcome if known else None


def expired_end(environ: Mapping[str, str] | None = None) -> str | None:
    """The variable, as NAME=VALUE, that puts this job's end into the past; None: there is none.

    A shell that keeps the variables of a job that has ended has one. :func:`read_batch_job` takes no end from it.
    """
    environ = os.environ if environ is None else environ
    end = _end(environ) if environ.get("SLURM_JOB_ID") else None
    return f"{end[0]}={environ[end[0]]}" if end is not None and end[1] <= time.time() else None


def _end(environ: Mapping[str, str]) -> tuple[str, float] | None:
    """The name and value of the variable that holds the job's end."""
    # The templates ask Slurm, and leave it empty for a job without a limit; newer versions of Slurm set their own.
    name = "NEMO_LMPO_JOB_END" if "NEMO_LMPO_JOB_END" in environ else "SLURM_JOB_END_TIME"
    value = _number(environ.get(name))
    return None if value is None else (name, value)


def leave_outcome(outcome: str) -> None:
    """Tell the batch script how the run ended; does nothing outside of the templates' jobs."""
    job = read_batch_job()
    if job is not None and job.directory is not None and job.directory.is_dir():
        replace_file(job.directory / "outcome", outcome + "\n")


def stopped(reason: str) -> str:
    """The outcome of a run that was saved before its last step."""
    return f"stopped {reason}"


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None
