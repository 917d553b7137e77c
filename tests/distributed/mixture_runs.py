"""What the tests of mixtures run in their workers: the real training session on the setting `moe_tiny`."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from nemo_lmpo.runtime.launch import LaunchInfo
from tests.distributed.training_runs import COMMON, metrics_of, weights_of
from tests.distributed.workers import run_workers

STEPS = 3
TP = ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
EP = ("model.expert_model_parallel_size=2",)
FSDP = ("model.fsdp=true", "optim.use_distributed_optimizer=true", "optim.overlap_grad_reduce=true")
SMALL = ("model.architecture.num_hidden_layers=2", "model.architecture.moe_intermediate_size=48")
RELATIVE = 1e-5


def balance(kind: str) -> tuple[str, ...]:
    """Settings of a term that weighs as much as the loss itself."""
    return (f"model.moe_aux_loss={kind}", "model.moe_aux_loss_coefficient=0.5")


def train_mixture(launch: LaunchInfo, run_dir: str, recipe: str, overrides: tuple[str, ...]) -> None:
    """Train in this process, one of several."""
    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.training.session import open_session

    config = load_recipe(recipe, [*COMMON, *SMALL, f"run_dir={run_dir}", "trainer.num_threads=1", *overrides])
    with open_session(config, launch) as session:
        session.train(time.time())


def run(world_size: int, run_dir: Path, overrides: tuple[str, ...] = (), recipe: str = "lmpo_moe_tiny") -> Path:
    """Train in ``world_size`` processes; the run directory."""
    run_workers(world_size, train_mixture, str(run_dir), recipe, overrides)
    return run_dir


def assert_equal_runs(found: Path, expected: Path, step: int = STEPS) -> None:
    """Losses, metrics, gradient norms and weights are the same within the rounding of float32."""
    lines, wanted = metrics_of(found), metrics_of(expected)
    assert [line.keys() for line in lines] == [line.keys() for line in wanted]
    for line, right in zip(lines, wanted, strict=True):
        for name, value in right.items():
            if not name.endswith("margin_normalized"):  # a difference of nearly equal numbers
                assert line[name] == pytest.approx(value, rel=RELATIVE, abs=1e-6), name
    ours, theirs = weights_of(found, step), weights_of(expected, step)
    for name, tensor in theirs.items():
        error = torch.linalg.vector_norm(ours[name] - tensor) / torch.linalg.vector_norm(tensor)
        assert error < RELATIVE, f"{name}: {error:.1e}"
