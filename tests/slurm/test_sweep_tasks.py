"""What ends a turn of one task of a sweep leaves the sweep's other tasks alone."""

from __future__ import annotations

import re

import pytest

from tests.slurm.stories import Stories
from tests.slurm.sweep_story import FINISHED, LAST, RUNNING

pytestmark = pytest.mark.slurm


def test_a_tasks_turns_end_as_a_jobs_do(stories: Stories) -> None:
    job = stories["sweep_tasks"]
    assert job.notes[f"events {LAST}"].splitlines() == [
        *("0 started", "0 SIGUSR1"),  # close to the time limit
        *("1 started", "1 crash"),
        *("2 started", "2 SIGTERM"),  # preempted
        *("3 started", "3 deaf", "3 SIGTERM"),  # at the time limit
        *("4 started", "4 SIGTERM"),  # scancel --batch --signal=TERM
    ], job.log
    said = [line for line in job.log.splitlines() if line.startswith(("slurm: ", "=== job"))]
    conclusions = [line for line in said if re.search("requeueing|starts the job again|not requeued", line)]
    assert conclusions == [
        "slurm: stopped SIGUSR1; requeueing (attempts without a new checkpoint: 0 of 3)",
        "slurm: crashed with status 3; requeueing (attempts without a new checkpoint: 0 of 3)",
        "slurm: stopped SIGTERM; Slurm starts the job again (preempted, a node failed, or scontrol requeue)",
        "slurm: stopped SIGTERM; requeueing (attempts without a new checkpoint: 0 of 3)",
        "slurm: saved and stopped as requested; not requeued; submit it again to resume",
    ]
    assert job.succeeded
    assert "slurm: error" not in job.log
    assert ".sh: line " not in job.log  # bash's own complaints


def test_the_other_tasks_hear_nothing_of_it(stories: Stories) -> None:
    notes = stories["sweep_tasks"].notes
    assert notes["others' state"] == "RUNNING"
    assert notes[f"events {RUNNING}"] == "0 started"
    assert notes["others' end"] == "COMPLETED 0 slurm: all steps are done"
    assert notes[f"events {FINISHED}"].splitlines() == ["0 started", "0 done"]
    for task in (FINISHED, RUNNING):
        assert notes[f"log {task}"].count("=== job ") == 1, notes[f"log {task}"]
