"""The executed step of mixtures of experts against arithmetic, and the plan against the executed step."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from megatron.core.transformer.moe import moe_utils

from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.config.rules import ParallelLayout, validate
from nemo_lmpo.formats.architecture import architecture_from_hf
from nemo_lmpo.sizing.flops import shape_of
from nemo_lmpo.sizing.memory import estimate_memory
from nemo_lmpo.sizing.rank_work import micro_batch_work, split_of
from nemo_lmpo.trace.experts import even_loads
from nemo_lmpo.trace.run import OPTIMIZER, Trace, trace_rank

LAYERS = 2
SEQUENCE = ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
EP2 = ("model.expert_model_parallel_size=2",)
MODELS = {
    "mixtral": ("lmpo_mixtral_8x7b",),
    # 32 experts instead of 128, so that a test takes seconds where each is a module of its own.
    "qwen3": ("lmpo_qwen3_30b_a3b", "model.architecture.num_experts=32"),
}
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ep4": (4, ("model.expert_model_parallel_size=4",)),
    "tp2_ep2_etp2": (4, (*SEQUENCE, *EP2, "model.expert_tensor_parallel_size=2")),
    "pp2_ep2": (4, (*EP2, "model.pipeline_model_parallel_size=2")),
    "cp2_ep2_recomputed": (
        2,
        (*EP2, "model.context_parallel_size=2", "model.activations_checkpoint_granularity=full"),
    ),
}
CASES = [
    *(("mixtral", name, True) for name in LAYOUTS),
    *(("mixtral", name, False) for name in ("ep4", "tp2_ep2_etp2")),
    *(("qwen3", name, True) for name in ("ep4", "tp2_ep2_etp2", "pp2_ep2")),
    ("qwen3", "cp2_ep2_recomputed", False),
]


@cache
def layout(model: str, name: str) -> ParallelLayout:
    """The published sizes with few layers."""
    processes, overrides = LAYOUTS[name]
    recipe, *sizes = MODELS[model]
    plain = (
        f"model.architecture.num_hidden_layers={LAYERS}",
        "data.row_tokens=4096",
        *(f"model.{kind}_parallel_size=1" for kind in ("tensor_model", "pipeline_model", "expert_tensor")),
        "model.virtual_pipeline_model_parallel_size=null",
        "model.sequence_parallel=false",
        "model.activations_checkpoint_granularity=null",
        "optim.use_distributed_optimizer=true",
        "optim.overlap_grad_reduce=true",
    )
    config = load_recipe(recipe, [*plain, *sizes, *overrides])
    assert config.model.architecture is not None
    return validate(config, architecture_from_hf(config.model.architecture), processes)


@cache
def trace(model: str, name: str, rank: int = 0, *, transformer_engine: bool = True) -> Trace:
    return trace_rank(layout(model, name), rank, transformer_engine=transformer_engine)


def last_rank(of: ParallelLayout) -> int:
    stages = of.config.model.pipeline_model_parallel_size
    return of.world_size // stages * (stages - 1)


def test_loads_are_even() -> None:
    assert even_loads(10, 4).tolist() == [3, 3, 2, 2]
    assert even_loads(3, 4).tolist() == [1, 1, 1, 0]
    assert even_loads(8192, 8).tolist() == [1024] * 8


def test_memory_of_experts_and_their_optimizer() -> None:
    """6 bytes of weight and gradient. 12 of optimizer state, of experts by nobody else, of the rest by four ranks."""
    expert = 2 * 3 * 4096 * 14336  # two of eight lie here
    shared = 4096 * 6144 + 4096 * 4096 + 8 * 4096 + 2 * 4096
    rest = LAYERS * shared + 4096 + 2 * 32000 * 4096
    expected = 6 * (LAYERS * expert + rest) + 12 * (LAYERS * expert + rest / 4)
    found = next(phase for phase in trace("mixtral", "ep4").phases if phase.name == OPTIMIZER)
    assert found.after == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(("model", "name", "engine"), CASES)
def test_the_plan_is_what_is_executed(model: str, name: str, engine: bool) -> None:
    """Memory within 5 %, products and bytes sent nearly exact, kernels and their bytes about right."""
    of = layout(model, name)
    ranks = {0, last_rank(of)}
    executed = {rank: trace(model, name, rank, transformer_engine=engine) for rank in ranks}
    peak = max(found.peak for found in executed.values())
    assert estimate_memory(of).total == pytest.approx(peak, rel=0.05)

    found = executed[last_rank(of)]
    split = replace(split_of(of), fused=engine, accumulate=8 if engine else 10)
    counted, work = micro_batch_work(shape_of(of.architecture), split, found.row, last=True), found.micro_batch
    assert counted.flops == pytest.approx(work.flops, rel=0.01)
    for group in ("expert", "expert tensor", "context", "pipeline"):
        sent = [sum(bytes_ for (_, name), bytes_ in each.sent.items() if name == group) for each in (counted, work)]
        assert sent[0] == pytest.approx(sent[1], rel=0.01, abs=1e5), group
        if group.startswith("expert"):
            calls = [sum(times for (_, name), times in each.calls.items() if name == group) for each in (counted, work)]
            assert calls[0] == calls[1], group
    # What the head's products add to the output matrix's gradient, chunk by chunk, is inside of products to the trace.
    matrix = of.architecture.vocab_size * of.architecture.hidden_size // split.tensor
    moved = sum(work.moved.values()) + 8 * -(-found.row.predicted // split.context // split.chunk) * matrix
    assert sum(counted.moved.values()) == pytest.approx(moved, rel=0.2)
    assert counted.num_kernels == pytest.approx(work.num_kernels, rel=0.15)


def test_tokens_that_travel() -> None:
    """Of 2 choices a token 3/4 go to other ranks: there and back, forward and backward. Weights are float32."""
    found, tokens = trace("mixtral", "ep4"), trace("mixtral", "ep4").row.tokens
    choices = LAYERS * 2 * tokens * 3 / 4
    assert found.micro_batch.sent["all-to-all", "expert"] == pytest.approx(choices * (4 * 4096 * 2 + 2 * 4), rel=0.01)
    assert found.micro_batch.calls["all-to-all", "expert"] == LAYERS * 6


def test_experts_compute_what_is_routed_to_them() -> None:
    """Two local experts get the choices of four ranks: a product each way of [tokens, 4096] x [4096, 2 x 14336] ..."""
    found = trace("mixtral", "ep4")
    grouped = [(product, times) for product, times in found.micro_batch.products.items() if product.grouped]
    assert sum(product.flops * times for product, times in grouped) == pytest.approx(
        LAYERS * 2 * found.row.tokens * 2 * 3 * 3 * 4096 * 14336, rel=1e-3
    )
    assert {product.batch for product, _ in grouped} == {2}


def test_each_layer_waits_once_for_its_loads() -> None:
    """Beside what the end of a step reads; without Transformer Engine megatron-core 0.16 counts masks, 0.19 sorts."""
    fused, plain = (trace("mixtral", "ep4", transformer_engine=engine).forward_backward for engine in (True, False))
    passes = LAYERS * trace("mixtral", "ep4").micro_batches
    masks = 0 if "align_size" in inspect.signature(moe_utils.permute).parameters else 2
    assert plain.host_reads - fused.host_reads == masks * passes
    assert fused.host_reads >= passes


def test_loads_of_a_rank_add_up() -> None:
    """Whatever does not divide: the choices that a rank sends are those that all ranks get."""
    for choices in (4096 * 8, 4091 * 8):
        loads = even_loads(choices, 128)
        assert loads.sum() == choices
        assert np.ptp(loads) <= 1
