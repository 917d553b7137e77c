"""NaN on one rank only: every rank hears of it, and none writes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_lmpo.runtime.launch import LaunchInfo
from nemo_lmpo.runtime.run_files import saved_steps
from tests.distributed.test_resume_across_layouts import BF16, FSDP, SHARDED
from tests.distributed.training_runs import COMMON, metrics_of, train, weights_of
from tests.distributed.workers import run_workers

SAVING = "checkpoint.save_interval=1"


def train_and_break(launch: LaunchInfo, run_dir: str, overrides: tuple[str, ...], broken: int, what: str) -> str:
    """Train three steps, after the last of which one rank's part of a tensor is NaN; this rank's error."""
    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.errors import TrainingError
    from nemo_lmpo.parallel.shards import own_part
    from nemo_lmpo.training import trainer
    from nemo_lmpo.training.session import open_session

    config = load_recipe("lmpo_tiny", [*COMMON, f"run_dir={run_dir}", "trainer.num_threads=1", SAVING, *overrides])
    seen = [0]
    module: Any = trainer
    optimizer_step = module.clip_and_step
    with open_session(config, launch) as session:

        def step_and_spoil(*arguments: Any) -> None:
            optimizer_step(*arguments)
            seen[0] += 1
            if seen[0] == 3 and launch.rank == broken:
                (inner,) = session.optimizer.chained_optimizers
                main, state = next(iter(inner.optimizer.state.items()))
                with torch.no_grad():
                    own_part(state.get(what, main)).local.view(-1)[0] = math.nan

        module.clip_and_step = step_and_spoil
        try:
            session.train(0.0)
        except TrainingError as error:
            return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("overrides", "broken", "what"),
    [
        (("model.tensor_model_parallel_size=2",), 1, "exp_avg"),
        (("model.tensor_model_parallel_size=2",), 0, "param"),
        ((SHARDED, BF16), 1, "exp_avg_sq"),
        ((SHARDED, BF16, "checkpoint.async_save=true"), 0, "param"),
        ((FSDP, BF16), 1, "exp_avg"),
    ],
)
def test_no_rank_writes_and_the_run_resumes(overrides: tuple[str, ...], broken: int, what: str, tmp_path: Path) -> None:
    told = run_workers(2, train_and_break, str(tmp_path / "run"), overrides, broken, what)
    assert told[0] == told[1]
    assert f"tensors on rank {broken})" in told[0]
    assert "step_0000002 is kept" in told[0]
    assert saved_steps(tmp_path / "run" / "checkpoints") == [1, 2]
    run_workers(2, train, str(tmp_path / "run"), (*overrides, SAVING))
    run_workers(2, train, str(tmp_path / "whole"), (*overrides, SAVING))
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    found, expected = weights_of(tmp_path / "run", 3), weights_of(tmp_path / "whole", 3)
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
