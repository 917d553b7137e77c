"""Every parallel layout gives the numbers of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.training_runs import metrics_of, train, weights_of
from tests.distributed.workers import run_workers

STEPS = 3
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "tp2": (2, ("model.tensor_model_parallel_size=2",)),
    "tp4": (4, ("model.tensor_model_parallel_size=4",)),
    "tp2_sequence": (2, ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")),
    "pp2": (2, ("model.pipeline_model_parallel_size=2",)),
    "pp4": (4, ("model.pipeline_model_parallel_size=4",)),
    "pp2_vpp2": (2, ("model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2")),
    "tp2_pp2": (4, ("model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2")),
    "dp2": (2, ()),
    "dp4": (4, ()),
    "dp2_distributed_optimizer": (2, ("optim.use_distributed_optimizer=true",)),
    "tp2_dp2_everything": (
        4,
        (
            "model.tensor_model_parallel_size=2",
            "model.sequence_parallel=true",
            "optim.use_distributed_optimizer=true",
            "optim.overlap_grad_reduce=true",
            "model.activations_checkpoint_granularity=full",
        ),
    ),
    "cp2": (2, ("model.context_parallel_size=2",)),
    "cp2_tp2_sequence": (
        4,
        ("model.context_parallel_size=2", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true"),
    ),
    "recompute_full": (1, ("model.activations_checkpoint_granularity=full",)),
    "recompute_selective": (1, ("model.activations_checkpoint_granularity=selective",)),
    "one_pair_a_row": (1, ("model.micro_batch_size=1",)),
    "all_pairs_in_one_row": (1, ("data.row_tokens=2000",)),
    "prompt_twice": (1, ("data.share_prompt=false",)),
    "small_logprob_chunks": (1, ("model.logprob_chunk_tokens=7",)),
    "untied_pp2_tp2": (
        4,
        (
            "model.architecture.tie_word_embeddings=false",
            "model.tensor_model_parallel_size=2",
            "model.pipeline_model_parallel_size=2",
        ),
    ),
}
RELATIVE = 1e-5


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory):
    """Runs of one process, by the settings that change what is learned."""
    done: dict[tuple[str, ...], Path] = {}

    def run(overrides: tuple[str, ...] = ()) -> Path:
        if overrides not in done:
            directory = tmp_path_factory.mktemp("one") / "run"
            run_workers(1, train, str(directory), overrides)
            done[overrides] = directory
        return done[overrides]

    return run


def assert_same_metrics(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for line, wanted in zip(found, expected, strict=True):
        # A normalised margin is a difference of float32 numbers near one, divided by the standard deviation:
        # rounding m once moves it by 2^-24 / std, whatever its own size.
        slack = {"lmpo/margin_normalized": 4 * 2.0**-24 / wanted.get("lmpo/std", 0.005)}
        slack["val/lmpo/margin_normalized"] = slack["lmpo/margin_normalized"]
        for name, value in wanted.items():
            assert line[name] == pytest.approx(value, rel=RELATIVE, abs=slack.get(name, 1e-7)), name


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = (found[name].double() - tensor.double()).norm() / tensor.double().norm()
        assert difference < tolerance, f"{name}: {difference:.1e}"


def changes_model(overrides: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(override for override in overrides if override.startswith("model.architecture"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_like_one_process(layout: str, reference, tmp_path: Path) -> None:
    world_size, overrides = LAYOUTS[layout]
    expected = reference(changes_model(overrides))
    statistics = run_workers(world_size, train, str(tmp_path / "run"), overrides)
    assert all(state == statistics[0] for state in statistics), "the statistics differ between ranks"
    assert_same_metrics(metrics_of(tmp_path / "run"), metrics_of(expected))
    assert_same_weights(weights_of(tmp_path / "run", STEPS), weights_of(expected, STEPS), RELATIVE)
