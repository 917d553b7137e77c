"""Profiles of chosen steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.config.rules.settings import profile
from nemo_lmpo.monitor.profile import StepProfiler


def test_records_the_chosen_steps_only(tmp_path: Path) -> None:
    profiler = StepProfiler([2, 3], tmp_path / "profile", rank=1)
    for number in range(1, 6):
        with profiler.step(number):
            torch.ones(3).sum()
        assert (tmp_path / "profile").exists() == (number >= 3)
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "steps_2-3_rank_1.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {"step 2", "step 3", "aten::sum"} <= names
    assert not {"step 1", "step 4"} & names


def test_a_run_that_ends_early_keeps_what_there_is(tmp_path: Path) -> None:
    profiler = StepProfiler([1, 9], tmp_path, rank=0)
    with profiler.step(1):
        pass
    profiler.close()
    assert [path.name for path in tmp_path.iterdir()] == ["steps_1-9_rank_0.json.gz"]
    profiler.close()


def test_nothing_is_recorded_unless_asked(tmp_path: Path) -> None:
    profiler = StepProfiler(None, tmp_path / "profile", rank=0)
    with profiler.step(1):
        pass
    profiler.close()
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("steps", [[3], [0, 2], [5, 4], []])
def test_steps_are_a_first_and_a_last_one(steps: list[int]) -> None:
    config = load_recipe("lmpo_tiny", ["trainer.profile=[2,2]"])
    assert list(profile(config)) == []
    config.trainer.profile = steps
    (message,) = profile(config)
    assert message.startswith(f"trainer.profile={steps} must be a first and a last step")
