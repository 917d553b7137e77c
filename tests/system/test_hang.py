"""A run of two ranks of which one hangs: both say where they stand, and leave it where `slurm status` finds it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from torch.distributed.flight_recorder.components.loader import read_dump

from nemo_lmpo.monitor.watchdog import EXIT_STATUS
from nemo_lmpo.slurm.status import show_status
from tests.system.test_lost_rank import two_ranks, wait_for_steps


def test_a_hang_is_kept_and_shown(tmp_path: Path) -> None:
    with two_ranks(tmp_path, "trainer.step_timeout=8") as ranks:
        wait_for_steps(ranks, tmp_path, 2)
        os.kill(ranks[1].pid, signal.SIGSTOP)
        ranks[0].join(timeout=90)
        assert ranks[0].exitcode == EXIT_STATUS
        # Its own time was up, too: it says so as soon as it is let go.
        os.kill(ranks[1].pid, signal.SIGCONT)
        ranks[1].join(timeout=90)
    hang = tmp_path / "run" / "hang"
    output = (tmp_path / "output0").read_text()
    assert "on rank 0 has taken more than trainer.step_timeout=8 seconds" in output
    assert "the stacks of all ranks are kept in run/hang" in output
    assert "torchfrtrace --prefix collectives_" in output
    assert "in _run" in (hang / "stacks_0.txt").read_text(), "where in the step it waits"
    recorded = read_dump("collectives_", str(hang / "collectives_0"))
    assert recorded["rank"] == 0
    assert recorded["entries"], "the collectives of the run"
    (line,) = (line for line in show_status([tmp_path / "run"]).split("\n") if "hang/" in line)
    assert "on rank" in line
    assert "has taken more than trainer.step_timeout=8 seconds" in line
