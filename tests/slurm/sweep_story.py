"""A sweep whose last task meets everything that can end a turn, while another runs on and a third is done.

The last task is the dangerous one: its SLURM_JOB_ID is the number of the whole array.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.slurm.local_slurm import LocalSlurm

if TYPE_CHECKING:
    from tests.slurm.stories import Job, Stories

ROOT = Path(__file__).resolve().parent.parent.parent
ROOM = "node5"
"""A node of its own, since a job that preempts takes all of its GPUs."""
FINISHED, RUNNING, LAST = 0, 1, 2


def tell_sweep_story(stories: Stories) -> Job:
    """The last task's end; `notes` has the log, the events and the restarts of each task."""
    cluster, cues = stories.cluster, stories.folder / "cues"
    cues.mkdir()
    (cues / f"{FINISHED}-0").write_text("done")
    (cues / f"{LAST}-3").write_text("deaf")  # this turn lasts until the time limit itself
    array = stories.submit(
        "sweep.sbatch",
        *("lmpo_tiny", "loss.lam=0.05,0.2,1.0"),
        options=("--array=0-2", "--gpus-per-node=1", "--ntasks-per-node=1", f"--nodelist={ROOM}"),
        NEMO_LMPO_PYTHON=stories.stand_in("acting", f"exec {sys.executable} -S {ROOT}/tests/slurm/acting_python.py"),
        TEST_CUES=str(cues),
    )
    last = f"{array}_{LAST}"

    def turn(number: int) -> None:
        stories.wait_for(lambda: f"{number} started" in events(LAST), f"turn {number} of the last task")

    def events(task: int) -> list[str]:
        path = stories.folder / "runs" / "slurm" / f"{array}_{task}" / "events"
        return path.read_text().splitlines() if path.is_file() else []

    stories.wait_for(lambda: "0 started" in events(RUNNING), "the task that runs on")
    waiter = stories.pool.submit(stories.finish, last)
    turn(0)
    cluster.run("scontrol", "update", f"JobId={last}", "TimeLimit=5")  # Slurm's own USR1: five minutes are left
    turn(1)
    (cues / f"{LAST}-1").write_text("crash")
    turn(2)
    preempt(cluster)
    turn(3)
    cluster.run("scontrol", "update", f"JobId={last}", "TimeLimit=1")
    turn(4)
    cluster.run("scancel", "--batch", "--signal=TERM", last)
    job = waiter.result()
    for task in (FINISHED, RUNNING, LAST):
        job.notes[f"events {task}"] = "\n".join(events(task))
        job.notes[f"log {task}"] = stories.log(f"{array}_{task}")
    job.notes["others' state"] = cluster.job(f"{array}_{RUNNING}")["JobState"]
    (cues / f"{RUNNING}-0").write_text("done")
    other = stories.finish(f"{array}_{RUNNING}")
    job.notes["others' end"] = f"{other.ending['JobState']} {other.ending['Restarts']} {other.log.splitlines()[-1]}"
    return job


def preempt(cluster: LocalSlurm) -> None:
    """A job that needs one GPU more than are free; Slurm takes it from the youngest job."""
    line = ("--partition=urgent", f"--nodelist={ROOM}", f"--gpus-per-node={cluster.gpus - 1}", "--output=/dev/null")
    cluster.run("sbatch", *line, "--wrap=sleep 2")
