"""A step that goes wrong stops every rank with the same message, and loses nothing that was saved."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_lmpo.checkpoint.manifest import find_damage
from nemo_lmpo.data.order import PairSampler
from nemo_lmpo.runtime.launch import LaunchInfo
from nemo_lmpo.runtime.run_files import saved_steps, step_directory
from tests.distributed.training_runs import COMMON, metrics_of
from tests.distributed.workers import run_workers

LAYOUTS = {
    "one": (1, ()),
    "tp2": (2, ("model.tensor_model_parallel_size=2",)),
    "pp2": (2, ("model.pipeline_model_parallel_size=2",)),
    "dp2": (2, ()),
}


def fail(launch: LaunchInfo, run_dir: str, overrides: tuple[str, ...], what: str) -> str:
    """Train; after the first step this process's last norm (or its gradient) is spoilt. The error's message."""
    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.errors import TrainingError
    from nemo_lmpo.training.session import open_session

    config = load_recipe("lmpo_tiny", [*COMMON, f"run_dir={run_dir}", "checkpoint.save_interval=1", *overrides])
    with open_session(config, launch) as session:
        policy: Any = session.policy
        finish, steps = policy.finish_training_step, 0
        parameters = [
            parameter
            for chunk in session.policy.models
            for name, parameter in chunk.named_parameters()
            if name.endswith("final_layernorm.weight")
        ]

        def finish_and_spoil() -> None:
            nonlocal steps
            steps += 1
            if what == "gradient" and steps == 2:
                for parameter in parameters:
                    parameter.main_grad.fill_(float("inf"))
            finish()

        policy.finish_training_step = finish_and_spoil
        if what == "loss":
            prepare, begun = policy.prepare_for_training_step, 0

            def spoil_and_prepare() -> None:
                nonlocal begun
                begun += 1
                if begun == 2:
                    for parameter in parameters:
                        with torch.no_grad():
                            parameter.fill_(float("nan"))
                prepare()

            policy.prepare_for_training_step = spoil_and_prepare
        try:
            session.train(time.time())
        except TrainingError as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite_stops_every_rank_and_names_the_pairs(layout: str, what: str, tmp_path: Path) -> None:
    world_size, overrides = LAYOUTS[layout]
    messages: list[Any] = run_workers(world_size, fail, str(tmp_path / "run"), overrides, what)
    assert set(messages) == {messages[0]}
    (message, *_) = messages
    expected = "the loss of step 2 is not finite for 12 of 12 pairs" if what == "loss" else "norm of step 2 is inf"
    assert expected in message
    indices = PairSampler(4096, 12, 42).pairs_of_step(1)
    assert ", ".join(f"tiny-train-{index:04d}" for index in indices[:8]) + " and 4 more" in message
    assert "optim.lr=0.001" in message
    checkpoints = tmp_path / "run" / "checkpoints"
    assert saved_steps(checkpoints) == [1]
    assert find_damage(step_directory(checkpoints, 1)) is None
    assert [line["step"] for line in metrics_of(tmp_path / "run") if "loss" in line] == [1]
