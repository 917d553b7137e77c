"""Small runs on a GPU, of the generated task."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.formats.mapping import LOCAL_SPEC_NAMES
from nemo_lmpo.runtime.launch import LaunchInfo
from nemo_lmpo.training import run
from nemo_lmpo.training.batches import StepBatch
from nemo_lmpo.training.session import TrainingSession, open_session
from tests.rehearsal.install import rehearsed

STEPS = 4 if rehearsed() else 10
SMALL = (
    *(("model.architecture.num_hidden_layers=2", "data.train.limit=64") if rehearsed() else ()),
    f"model.global_batch_size={8 if rehearsed() else 16}",
    "data.validation.limit=16",
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=0",
    "checkpoint.save_interval=0",
    "logging.tensorboard=false",
    "logging.report=false",
    "logging.progress_bar=false",
)
FLOAT32 = ("trainer.precision='32'", "model.transformer_engine=false", "model.attention_backend=sdpa")
BF16 = ("trainer.precision=bf16", "model.transformer_engine=false")
TE = ("trainer.precision=bf16", "model.transformer_engine=true")

NEEDS_TE = (
    pytest.mark.transformer_engine,
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
    ),
)

Gradients = dict[str, torch.Tensor]


@contextmanager
def session(directory: Path, *overrides: str) -> Iterator[TrainingSession]:
    """A session at step 0."""
    with open_session(load_recipe("lmpo_tiny", [*SMALL, f"run_dir={directory}", *overrides]), LaunchInfo()) as opened:
        yield opened


def train(directory: Path, *overrides: str) -> list[dict[str, float]]:
    """Run the training as the command does, resuming what is there; the metrics of the steps."""
    run(load_recipe("lmpo_tiny", [*SMALL, f"run_dir={directory}", *overrides]), LaunchInfo())
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def gradients_by_name(model: torch.nn.Module) -> Gradients:
    """Float32 gradients under the names of Transformer Engine's layers, which the local spec's map to."""
    result = {}
    for name, parameter in model.named_parameters():
        for local, fused in LOCAL_SPEC_NAMES.items():
            name = name.removesuffix(local) + fused if name.endswith(local) else name
        result[name] = parameter.main_grad.float().cpu().clone()  # type: ignore[attr-defined]  # megatron-core's
    return result


def batch_of(opened: TrainingSession, step: int) -> StepBatch:
    """The pairs of a step, on the device."""
    return opened.steps.builder.build(opened.data.train, opened.steps.sampler.pairs_of_step(step))


def first_batch(opened: TrainingSession) -> tuple[torch.Tensor, Gradients]:
    """Sums of log-probabilities and gradients of the first step's pairs, under the start weights."""
    batch = batch_of(opened, 0)
    policy = opened.policy
    statistics: Any = policy.statistics
    before = statistics.state_dict()
    policy.prepare_for_training_step()
    pairs = policy.run_batch(batch, forward_only=False)
    sums = torch.stack([pairs.column("logps/chosen_sum"), pairs.column("logps/rejected_sum")]).cpu()
    statistics.load_state_dict(before)  # a look is not a step
    return sums, gradients_by_name(policy.models[0])
