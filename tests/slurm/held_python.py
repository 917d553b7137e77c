"""`python -m MODULE ...` with a brake: training waits before a step for as long as a file exists.

Lets a test act at a known step, however fast or slow the machine is: `TEST_HOLD=3=FILE,5=FILE`, steps counted from 0.
What started a process is appended to `TEST_LAUNCHERS`, a file.
"""

import os
import runpy
import sys
import time
from pathlib import Path


def install_brake() -> None:
    from nemo_lmpo.training.trainer import PreferenceTrainer

    original = PreferenceTrainer.train_step
    brakes = dict(entry.split("=", 1) for entry in os.environ["TEST_HOLD"].split(","))

    def train_step(self: PreferenceTrainer, step: int) -> dict[str, float]:
        while str(step) in brakes and Path(brakes[str(step)]).exists():
            time.sleep(0.05)
        return original(self, step)

    setattr(PreferenceTrainer, "train_step", train_step)  # noqa: B010  (mypy takes no assignment to a method)


def note_launcher() -> None:
    with Path(os.environ["TEST_LAUNCHERS"]).open("a") as file:
        file.write("torchrun\n" if "TORCHELASTIC_RUN_ID" in os.environ else "srun\n")


if __name__ == "__main__":
    assert sys.argv[1] == "-m", sys.argv
    module, sys.argv = sys.argv[2], sys.argv[2:]
    if module == "nemo_lmpo.train" and "TEST_LAUNCHERS" in os.environ:
        note_launcher()
    if module == "nemo_lmpo.train" and "TEST_HOLD" in os.environ:
        install_brake()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
