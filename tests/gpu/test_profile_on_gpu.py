"""What a profile holds on a GPU besides the trace: its ranges and a snapshot of the memory."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_lmpo.monitor.profile import StepProfiler


def test_a_profile_holds_trace_and_memory(tmp_path: Path) -> None:
    profiler = StepProfiler([2, 2], tmp_path, rank=0)
    for step in (1, 2, 3):
        with profiler.step(step):
            torch.ones(4, device="cuda").sum()
    assert {path.name for path in tmp_path.iterdir()} == {
        "steps_2-2_rank_0.json.gz",
        "steps_2-2_rank_0_memory.pickle",
    }
