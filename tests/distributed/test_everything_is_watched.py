"""Wherever ranks wait for each other, from the first step's preparation to the end, the watchdog counts the time."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from nemo_lmpo.runtime.launch import LaunchInfo
from tests.distributed.training_runs import COMMON
from tests.distributed.workers import run_workers

COLLECTIVES = (
    *("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single"),
    *(
        "all_gather_object",
        "broadcast_object_list",
        "gather_object",
        "scatter_object_list",
        "barrier",
        "isend",
        "irecv",
    ),
    *("batch_isend_irecv", "_all_gather_base", "_reduce_scatter_base", "gather", "scatter", "reduce", "isend", "irecv"),
)
NOT_WATCHED = {
    "meet",  # the first words between the ranks; `trainer.distributed_timeout` is what there is before them
    "refuse_other_data_on_other_ranks",  # waits for whoever tokenizes longest, which has no limit
}


def run_and_look(
    launch: LaunchInfo, run_dir: str, steps: int, overrides: tuple[str, ...]
) -> tuple[list[str], list[str]]:
    """Train, or resume, and write a `.nemo`; the phases with collectives, and the places of those outside of any."""
    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.monitor import watchdog
    from nemo_lmpo.training.session import open_session

    phases: dict[str, None] = {}
    outside: dict[str, None] = {}

    def watch(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            frames = traceback.extract_stack()
            if watchdog._PHASES:
                phases[watchdog._PHASES[-1][0]] = None
            elif not NOT_WATCHED & {frame.name for frame in frames}:
                own = [frame for frame in frames if "/nemo_lmpo/" in frame.filename]
                outside[" > ".join(f"{Path(frame.filename).name}:{frame.name}" for frame in own[-4:])] = None
            return function(*arguments, **options)

        return call

    for name in COLLECTIVES:
        for module in (dist, dist.distributed_c10d):
            if hasattr(module, name):
                setattr(module, name, watch(getattr(module, name)))
    options = (f"run_dir={run_dir}", f"trainer.max_steps={steps}", "logging.samples=1", "logging.sample_tokens=2")
    config = load_recipe("lmpo_tiny", [*COMMON, *options, "trainer.num_threads=1", *overrides])
    with open_session(config, launch) as session:
        session.train(time.time())
        session.files.save_to(f"{run_dir}/policy.nemo")
    return list(phases), list(outside)


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.tensor_model_parallel_size=2", "loss=dpo", "checkpoint.async_save=true"),
        (
            "optim.use_distributed_optimizer=true",
            "trainer.precision=bf16",
        ),
        ("model.fsdp=true", "model.peft.name=lora", "loss=dpo"),
    ],
)
def test_no_collective_is_left_out(overrides: tuple[str, ...], tmp_path: Path) -> None:
    begun = run_workers(2, run_and_look, str(tmp_path / "run"), 1, overrides)
    resumed = run_workers(2, run_and_look, str(tmp_path / "run"), 2, overrides)
    for (first, outside), (second, outside_again) in zip(begun, resumed, strict=True):
        assert not {*outside, *outside_again}, "\n".join({*outside, *outside_again})
        wanted = {"step 1", "step 2", "saving step 1", "loading the newest checkpoint", "token 1 of sampled answers"}
        assert wanted <= {*first, *second}
