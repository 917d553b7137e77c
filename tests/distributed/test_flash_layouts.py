"""The attention that GPUs run, in every layout, trains like SDPA in one process.

The flash kernel itself is replaced by its definition on CPUs; plan, gathering, derivative and the way through
megatron-core's schedules and recomputation are the real ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_lmpo.runtime.launch import LaunchInfo
from tests.distributed.test_layouts import RELATIVE, STEPS, assert_same_metrics, assert_same_weights
from tests.distributed.training_runs import metrics_of, train, weights_of
from tests.distributed.workers import run_workers

WINDOW = ("model.architecture.model_type=mistral", "+model.architecture.sliding_window=16")
PP2 = ("model.pipeline_model_parallel_size=2",)
FULL = ("model.activations_checkpoint_granularity=full",)
TP2_SEQUENCE = ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "window": (1, WINDOW),
    "prompt_twice": (1, ("data.share_prompt=false",)),
    "recompute_selective": (
        1,
        ("model.activations_checkpoint_granularity=selective", "model.recompute_modules=[core_attn]"),
    ),
    "tp2_sequence": (2, TP2_SEQUENCE),
    "cp2_window_recompute": (2, ("model.context_parallel_size=2", *WINDOW, *FULL)),
    # Forward passes of later micro-batches stand between a layer's forward and its recomputation.
    "pp2_recompute": (2, (*PP2, *FULL)),
    "pp2_vpp2": (2, (*PP2, "model.virtual_pipeline_model_parallel_size=2")),
}


def train_with(launch: LaunchInfo, run_dir: str, overrides: tuple[str, ...], attention: str) -> int:
    """Train with this attention; how often the flash kernel ran."""
    from nemo_lmpo.model.kernels import Kernels
    from nemo_lmpo.training import policy
    from tests.flash_reference import flash_on_cpu

    def choose(*_: Any, **__: Any) -> Kernels:
        return Kernels(transformer_engine=False, attention=attention)

    with flash_on_cpu() as calls, pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "choose_kernels", choose)
        train(launch, run_dir, overrides)
        return len(calls)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs of one process with SDPA, by what changes the model."""
    done: dict[tuple[str, ...], tuple[list[dict[str, float]], dict[str, torch.Tensor]]] = {}

    def run(overrides: tuple[str, ...]) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        if overrides not in done:
            directory = tmp_path_factory.mktemp("one") / "run"
            assert run_workers(1, train_with, str(directory), overrides, "sdpa") == [0]
            done[overrides] = metrics_of(directory), weights_of(directory, STEPS)
        return done[overrides]

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flash_attention_trains_like_sdpa_in_one_process(layout: str, reference: Any, tmp_path: Path) -> None:
    world_size, overrides = LAYOUTS[layout]
    metrics, weights = reference(tuple(override for override in overrides if "model.architecture" in override))
    calls = run_workers(world_size, train_with, str(tmp_path / "run"), overrides, "flash")
    assert all(calls), "some rank never ran the kernel"
    assert_same_metrics(metrics_of(tmp_path / "run"), metrics)
    assert_same_weights(weights_of(tmp_path / "run", STEPS), weights, RELATIVE)
