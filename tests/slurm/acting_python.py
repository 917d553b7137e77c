"""A stand-in for `python -m nemo_lmpo.train ...` that needs no processor time and does what a test tells it.

It hears signals as the trainer does: notes them, leaves a checkpoint and an outcome, and ends. Otherwise it waits for
the file `$TEST_CUES/TASK-TURN`, whose text is how the turn ends: "done", or "crash". With "deaf" it does not hear USR1.
"""

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

JOB = Path(os.environ["NEMO_LMPO_JOB_DIR"])
TURN = os.environ["SLURM_RESTART_COUNT"]
CUE = Path(os.environ["TEST_CUES"]) / f"{os.environ['SLURM_ARRAY_TASK_ID']}-{TURN}"


def note(event: str) -> None:
    with (JOB / "events").open("a") as file:
        file.write(f"{TURN} {event}\n")


def save(outcome: str) -> None:
    (JOB / "run_dir").write_text(f"{JOB / 'run'}\n")
    (JOB / "run" / "checkpoints" / f"step_{TURN}").mkdir(parents=True)
    (JOB / "outcome").write_text(f"{outcome}\n")


def on_signal(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    note(name)
    save(f"stopped {name}")
    sys.exit(0)


if __name__ == "__main__":
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, on_signal)
    note("started")
    while not CUE.exists():
        time.sleep(0.1)
    cue = CUE.read_text()
    note(cue)
    if cue == "deaf":
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        while True:
            time.sleep(0.1)
    if cue == "crash":
        save("")
        sys.exit(3)
    save("done")
