"""Every layout on Transformer Engine's layers trains like one process on megatron-core's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.distributed.test_layouts import (
    QWEN2,
    QWEN3,
    RELATIVE,
    STEPS,
    assert_same_metrics,
    assert_same_metrics_in_bfloat16,
    assert_same_weights,
)
from tests.distributed.test_lora import LORA, adapters_of
from tests.distributed.training_runs import metrics_of, weights_of
from tests.te_emulation import runs
from tests.te_emulation.host import Host

TP2_SEQUENCE = ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
PP2 = ("model.pipeline_model_parallel_size=2",)
CP2 = ("model.context_parallel_size=2",)
FULL = ("model.activations_checkpoint_granularity=full",)
SHARDED = ("optim.use_distributed_optimizer=true", "optim.overlap_grad_reduce=true")
FSDP = "model.fsdp=true"
BF16 = ("trainer.precision=bf16",)
TE_ATTENTION = (*BF16, "model.attention_backend=te")
WINDOW = ("model.architecture.model_type=mistral", "+model.architecture.sliding_window=16")
MIXTURE = (
    *("model.architecture.model_type=qwen3_moe", "+model.architecture.num_experts=4"),
    *("+model.architecture.num_experts_per_tok=2", "+model.architecture.moe_intermediate_size=48"),
    *("+model.architecture.norm_topk_prob=true", "+model.architecture.head_dim=8"),
)
STEADY = ("optim.sched.name=constant",)  # the rate must not follow the run's length, which differs
Reference = Callable[[tuple[str, ...]], Path]

FLOAT32: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "tp2_sequence": (2, TP2_SEQUENCE),
    "tp2_sequence_recomputed": (2, (*TP2_SEQUENCE, *FULL)),
    "pp2": (2, PP2),
    # Between a micro-batch's forward and its second forward stand those of others, in the same layers.
    "pp2_vpp2_recomputed": (2, (*PP2, "model.virtual_pipeline_model_parallel_size=2", *FULL)),
    "cp2": (2, CP2),
    # Biases, whose gradients come with those of the weights; norms over heads, of which each rank has some.
    "qwen2_tp2_sequence": (2, (*QWEN2, *TP2_SEQUENCE)),
    # Grouped products, on ranks that hold different experts.
    "mixture_dp2_ep2": (2, (*MIXTURE, "model.expert_model_parallel_size=2")),
    "qwen3_tp2": (2, (*QWEN3, "model.tensor_model_parallel_size=2")),
}
BFLOAT16: dict[str, tuple[int, tuple[str, ...]]] = {
    "dp2_sharded": (2, (*BF16, *SHARDED)),
    "tp2_sequence_sharded_recomputed": (2, (*BF16, *TP2_SEQUENCE, *SHARDED, *FULL)),
    "dp2_fsdp": (2, (*BF16, FSDP)),
    "tp2_sequence_fsdp_recomputed": (4, (*BF16, *TP2_SEQUENCE, *FULL, FSDP)),
    "te_attention_tp2_sequence": (2, (*TE_ATTENTION, *TP2_SEQUENCE)),
    "te_attention_window_cp2_recomputed": (2, (*TE_ATTENTION, *WINDOW, *CP2, *FULL)),
}


@pytest.fixture(scope="module")
def reference(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Runs of one process on megatron-core's own layers, by the settings that change what is learned."""
    done: dict[tuple[str, ...], Path] = {}

    def run(overrides: tuple[str, ...]) -> Path:
        learned = tuple(o for o in overrides if o in (*LORA, *BF16, *STEADY) or "model.architecture" in o)
        if learned not in done:
            done[learned] = tmp_path_factory.mktemp("local") / "run"
            host.run(1, runs.train_local, str(done[learned]), learned)
        return done[learned]

    return run


def train(host: Host, world_size: int, run: Path, overrides: tuple[str, ...], fault: str | None = None) -> None:
    """On Transformer Engine: that its products, norms, rotation and optimizer ran is seen on every rank."""
    expected = {"gemm", "rmsnorm_fwd", "rmsnorm_bwd", "fused_rope_backward", "multi_tensor_adam"}
    if LORA[0] not in overrides and FSDP not in overrides:  # which leave weights no gradient of their own to add to
        expected.add(runs.IN_PLACE)
    for calls in host.run(world_size, runs.train_te, str(run), overrides, fault):
        assert expected <= calls.keys()
        assert ("fused_attn_bwd" in calls) == (TE_ATTENTION[-1] in overrides)


@pytest.mark.parametrize("layout", FLOAT32)
def test_trains_like_local_layers(layout: str, host: Host, reference: Reference, tmp_path: Path) -> None:
    world_size, overrides = FLOAT32[layout]
    train(host, world_size, tmp_path / "run", overrides)
    assert_same_run(tmp_path / "run", reference(overrides))


def assert_same_run(run: Path, expected: Path) -> None:
    # Weights first: their names say more.
    assert_same_weights(weights_of(run, STEPS), weights_of(expected, STEPS), RELATIVE)
    assert_same_metrics(metrics_of(run), metrics_of(expected))


@pytest.mark.parametrize("layout", BFLOAT16)
def test_trains_like_local_layers_in_bfloat16(layout: str, host: Host, reference: Reference, tmp_path: Path) -> None:
    world_size, overrides = BFLOAT16[layout]
    train(host, world_size, tmp_path / "run", overrides)
    assert_same_metrics_in_bfloat16(metrics_of(tmp_path / "run"), metrics_of(reference(overrides)))


def test_adapters_train_like_those_on_local_layers(host: Host, reference: Reference, tmp_path: Path) -> None:
    overrides = (*LORA, *TP2_SEQUENCE, *FULL)
    train(host, 2, tmp_path / "run", overrides)
    assert_same_adapters(tmp_path / "run", reference(overrides))


def test_adapters_on_grouped_experts(host: Host, reference: Reference, tmp_path: Path) -> None:
    """All experts of a rank in one product; each expert is cut over two ranks, and lies on two of four."""
    layout = (*TP2_SEQUENCE, "model.expert_model_parallel_size=2", "model.expert_tensor_parallel_size=2")
    overrides = (*LORA, *STEADY, *MIXTURE, *layout)
    train(host, 4, tmp_path / "run", overrides)
    assert_same_adapters(tmp_path / "run", reference(overrides))


def assert_same_adapters(run: Path, expected: Path) -> None:
    assert_same_metrics(metrics_of(run), metrics_of(expected))
    wanted = adapters_of(expected, STEPS)
    for name, tensor in adapters_of(run, STEPS).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0.0, atol=1e-5, msg=name)


def test_kernels_may_change_at_a_resume(host: Host, reference: Reference, tmp_path: Path) -> None:
    """Transformer Engine's layers have other names and more state; its optimizer goes on from torch's, and back."""
    parts = ((2, runs.train_te, TP2_SEQUENCE), (1, runs.train_local, ()), (2, runs.train_te, PP2))
    for steps, (world_size, train_part, layout) in enumerate(parts, start=1):
        host.run(world_size, train_part, str(tmp_path), (*STEADY, *layout, f"trainer.max_steps={steps}"))  # type: ignore[arg-type]
    assert len(parts) == STEPS
    assert_same_weights(weights_of(tmp_path, STEPS), weights_of(reference(STEADY), STEPS), RELATIVE)


def test_an_optimizer_on_the_host_trains_like_one_on_the_gpu(host: Host, reference: Reference, tmp_path: Path) -> None:
    """Two replicas, resumed in the middle from what a plain optimizer saved, and gone on from by one."""
    ends = (*BF16, *STEADY)
    host.run(2, runs.train_te, str(tmp_path), (*ends, *SHARDED, "trainer.max_steps=1"))
    for on_host, on_gpu in host.run(2, runs.train_offloaded, str(tmp_path), (*ends, *SHARDED, "trainer.max_steps=2")):
        assert on_host > 10
        assert on_gpu == 0
    host.run(1, runs.train_local, str(tmp_path), (*ends, "trainer.max_steps=3"))
    training = [line for line in metrics_of(tmp_path) if "loss" in line]
    assert_same_metrics_in_bfloat16(training, [line for line in metrics_of(reference(ends)) if "loss" in line])
    # AdamW makes a whole step of what is left of a gradient where it is next to nothing, rounded either way.
    assert_same_weights(weights_of(tmp_path, STEPS), weights_of(reference(ends), STEPS), 2.0**-6)


FAULTS: dict[str, tuple[int, tuple[str, ...], str]] = {
    "norms without their mark": (2, TP2_SEQUENCE, r"layernorm\.weight"),
    "gradients added again": (1, (), "the gradient norm of step 1 is nan"),
    "adapters on what is not normed": (1, LORA, "grad_norm"),
    "adapters without their mark": (2, (*LORA, *TP2_SEQUENCE), "grad_norm"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault: str, host: Host, reference: Reference, tmp_path: Path) -> None:
    """What could go wrong between the project and Transformer Engine fails the tests above."""
    world_size, overrides, message = FAULTS[fault]
    compare = assert_same_adapters if LORA[0] in overrides else assert_same_run

    def train_and_compare() -> None:
        train(host, world_size, tmp_path / "run", overrides, fault)
        compare(tmp_path / "run", reference(overrides))

    with pytest.raises(AssertionError, match=message):
        train_and_compare()
