"""Every parallel layout gives the numbers of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    "pp3_embedding_and_loss_as_layers": (
        3,
        (
            "model.pipeline_model_parallel_size=3",
            "model.account_for_embedding_in_pipeline_split=true",
            "model.account_for_loss_in_pipeline_split=true",
        ),
    ),
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
    # Three ranks cut no matrix evenly, and leave the last one less than the others.
    "dp3_fsdp": (3, ("model.fsdp=true",)),
    "dp2_fsdp_recompute": (2, ("model.fsdp=true", "model.activations_checkpoint_granularity=full")),
    "tp2_dp2_fsdp": (
        4,
        (
            *("model.fsdp=true", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true"),
            # As in the recipes of 8 B models: what these ask for is part of FSDP.
            *("optim.use_distributed_optimizer=true", "optim.overlap_grad_reduce=true"),
        ),
    ),
    "cp2_dp2_fsdp": (4, ("model.fsdp=true", "model.context_parallel_size=2")),
    "untied_dp2_fsdp": (2, ("model.fsdp=true", "model.architecture.tie_word_embeddings=false")),
    "cp2": (2, ("model.context_parallel_size=2",)),
    "cp2_tp2_sequence": (
        4,
        ("model.context_parallel_size=2", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true"),
    ),
    "recompute_full": (1, ("model.activations_checkpoint_granularity=full",)),
    "recompute_selective_tp2_sequence": (
        2,
        (
            "model.tensor_model_parallel_size=2",
            "model.sequence_parallel=true",
            "model.activations_checkpoint_granularity=selective",
            "model.recompute_modules=[mlp,core_attn]",
        ),
    ),
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
# Biases of q, k, v and norms over heads: split, replicated with partial gradients, or on one stage.
QWEN2 = ("model.architecture.model_type=qwen2",)
QWEN3 = ("model.architecture.model_type=qwen3", "model.architecture.head_dim=24")
LAYOUTS |= {
    "qwen2_tp2_pp2_sequence": (
        4,
        (
            *QWEN2,
            "model.tensor_model_parallel_size=2",
            "model.pipeline_model_parallel_size=2",
            "model.sequence_parallel=true",
        ),
    ),
    "qwen3_tp2_sequence_dp2_distributed_optimizer": (
        4,
        (
            *QWEN3,
            "model.tensor_model_parallel_size=2",
            "model.sequence_parallel=true",
            "optim.use_distributed_optimizer=true",
        ),
    ),
    "qwen3_tp2_sequence_dp2_fsdp": (
        4,
        (*QWEN3, "model.tensor_model_parallel_size=2", "model.sequence_parallel=true", "model.fsdp=true"),
    ),
    "qwen3_cp2": (2, (*QWEN3, "model.context_parallel_size=2")),
}
RELATIVE = 1e-5
BF16_LAYOUTS = ("tp2_sequence", "pp2_vpp2", "dp2_distributed_optimizer", "cp2", "tp2_dp2_everything", "tp2_dp2_fsdp")
# Rounding to bfloat16 (8 significant bits) errs by 2^-7 / sqrt(12) relative, root mean square. Two layouts round their
# partial sums apart twice a layer, and errors add up like a random walk: over 4 layers sqrt(8) of that. A loss is the
# mean over 12 pairs, which err independently; four standard deviations of it are 0.7 %. A gradient has passed as many
# roundings again on its way back: sqrt(2) more.
BF16_LOSS = 4 * (2.0**-7 / 12**0.5) * 8**0.5 / 12**0.5
BF16_GRADIENT = 2**0.5 * BF16_LOSS


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs of one process, by the settings that change what is learned."""
    done: dict[tuple[str, ...], Path] = {}

    def run(overrides: tuple[str, ...] = ()) -> Path:
        if overrides not in done:
            directory = tmp_path_factory.mktemp("one") / "run"
            run_workers(1, train, str(directory), overrides)
            done[overrides] = directory
        return done[overrides]

    return run


def assert_same_metrics(
    found: list[dict[str, float]], expected: list[dict[str, float]], *, rewards: float | None = None
) -> None:
    """``rewards`` is how far rewards, and a loss that is made of them, may lie apart by rounding."""
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for line, wanted in zip(found, expected, strict=True):
        # A normalised margin is a difference of float32 numbers near one, divided by the standard deviation:
        # rounding m once moves it by 2^-24 / std, whatever its own size.
        slack = {"lmpo/margin_normalized": 4 * 2.0**-24 / wanted.get("lmpo/std", 0.005)}
        slack["val/lmpo/margin_normalized"] = slack["lmpo/margin_normalized"]
        # So is a margin of rewards that are each rounded.
        for prefix in ("", "val/"):
            reward = abs(wanted.get(f"{prefix}rewards/chosen", 0.0))
            slack[f"{prefix}rewards/margins"] = slack[f"{prefix}lmpo/margin"] = 4 * 2.0**-24 * reward
        if rewards is not None:
            names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "loss")
            slack |= {f"{prefix}{name}": rewards for prefix in ("", "val/") for name in names}
        for name, value in wanted.items():
            assert line[name] == pytest.approx(value, rel=RELATIVE, abs=slack.get(name, 1e-7)), name


def assert_same_metrics_in_bfloat16(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, wanted in zip(found, expected, strict=True):
        for name in wanted.keys() & {"loss", "logps/chosen", "logps/rejected", "val/loss"}:
            assert line[name] == pytest.approx(wanted[name], rel=BF16_LOSS), name
        if "grad_norm" in wanted:
            assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=BF16_GRADIENT)


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    far = {
        n: float((found[n].double() - right.double()).norm() / right.double().norm()) for n, right in expected.items()
    }
    assert max(far.values()) < tolerance, {name: f"{value:.1e}" for name, value in far.items() if value >= tolerance}


def changes_model(overrides: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(override for override in overrides if override.startswith("model.architecture"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_like_one_process(layout: str, reference: Any, tmp_path: Path) -> None:
    world_size, overrides = LAYOUTS[layout]
    expected = reference(changes_model(overrides))
    statistics = run_workers(world_size, train, str(tmp_path / "run"), overrides)
    assert all(state == statistics[0] for state in statistics), "the statistics differ between ranks"
    assert_same_metrics(metrics_of(tmp_path / "run"), metrics_of(expected))
    assert_same_weights(weights_of(tmp_path / "run", STEPS), weights_of(expected, STEPS), RELATIVE)


FEW = "data.train.limit=60"
LOSSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # Statistics before the losses, over groups of pairs that neither rows nor ranks follow.
    "released_code": (
        ("loss.compat=released_code", "loss.group_size=5", "loss.momentum=0.5"),
        ("model.pipeline_model_parallel_size=2", "data.row_tokens=200"),
    ),
    # Sums over part of a response, which context parallelism cuts, too. A reference of few pairs is soon computed.
    "dpo_fsdp": (("loss.name=dpo", "loss.beta=0.5", FEW), ("model.fsdp=true", "model.reference_in_memory=true")),
    "ld_dpo": (("loss.name=dpo", "loss.ld_alpha=0.3", "loss.beta=0.5", FEW), ("model.context_parallel_size=2",)),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_that_look_beyond_their_micro_batch(loss: str, reference: Any, tmp_path: Path) -> None:
    options, layout = LOSSES[loss]
    expected = reference((*options, f"data.cache_dir={tmp_path / 'one'}"))
    # A cache of its own, so that this layout computes the reference's log-probabilities itself.
    layout = (*layout, f"data.cache_dir={tmp_path / 'cache'}")
    statistics = run_workers(4, train, str(tmp_path / "run"), (*options, *layout))
    assert all(state == statistics[0] for state in statistics), "the statistics differ between ranks"
    lines, wanted = metrics_of(tmp_path / "run"), metrics_of(expected)
    compares = loss != "released_code"
    if compares:
        # In the first step the policy is the reference: what is ranked right is up to rounding.
        for line in (lines[0], wanted[0]):
            del line["rewards/accuracies"]
    # Sums of 20 tokens of 4 nats, rounded in policy and reference, times beta; the margins' rewards are means.
    assert_same_metrics(lines, wanted, rewards=4 * 2.0**-24 * 80 * 0.5 if compares else None)
    assert_same_weights(weights_of(tmp_path / "run", STEPS), weights_of(expected, STEPS), RELATIVE)


@pytest.mark.parametrize("layout", BF16_LAYOUTS)
def test_layout_trains_like_one_process_in_bfloat16(layout: str, reference: Any, tmp_path: Path) -> None:
    """Main parameters and sums over the data are float32 in every layout; only the layers' roundings differ."""
    world_size, overrides = LAYOUTS[layout]
    bf16 = ("trainer.precision=bf16",)
    expected = metrics_of(reference(bf16))
    statistics = run_workers(world_size, train, str(tmp_path / "run"), (*overrides, *bf16))
    assert all(state == statistics[0] for state in statistics), "the statistics differ between ranks"
    assert_same_metrics_in_bfloat16(metrics_of(tmp_path / "run"), expected)
