"""The executed step against arithmetic, and the instant dry run and the step-time model against the executed step."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.config.rules import ParallelLayout, validate
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.formats.architecture import architecture_from_hf
from nemo_lmpo.sizing.flops import shape_of
from nemo_lmpo.sizing.memory import estimate_memory
from nemo_lmpo.sizing.rank_work import micro_batch_work, split_of
from nemo_lmpo.sizing.step_time import ROUNDING_BYTES
from nemo_lmpo.trace.run import FORWARD_BACKWARD, MODEL, OPTIMIZER, STEP, Phase, Trace, filling_examples, trace_rank
from nemo_lmpo.training.rounded_moments import AT_A_TIME

LAYERS = 2
# Weights of a layer, its two norms, and the vocabulary as tensor parallelism of 4 pads it.
LAYER = 4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336 + 2 * 4096
VOCABULARY = 128512 * 4096
DISTRIBUTED = ("optim.use_distributed_optimizer=true", "optim.overlap_grad_reduce=true")
FSDP = ("model.fsdp=true", *DISTRIBUTED)
ROUNDED = "optim.moments_dtype=bf16"
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "tp4": (4, ()),
    "tp2_dp2": (4, ("model.tensor_model_parallel_size=2", *DISTRIBUTED)),
    "tp4_pp2": (8, ("model.pipeline_model_parallel_size=2",)),
    "tp2_cp2": (4, ("model.tensor_model_parallel_size=2", "model.context_parallel_size=2", *DISTRIBUTED)),
    "fsdp4": (4, (*FSDP, "model.tensor_model_parallel_size=1", "model.sequence_parallel=false")),
    "tp2_fsdp2": (4, (*FSDP, "model.tensor_model_parallel_size=2")),
    "fsdp4_recomputed": (
        4,
        (
            *(*FSDP, "model.tensor_model_parallel_size=1", "model.sequence_parallel=false"),
            "model.activations_checkpoint_granularity=full",
        ),
    ),
    "tp4_recomputed": (4, ("model.activations_checkpoint_granularity=full",)),
    "tp4_mlp_recomputed": (4, ("model.activations_checkpoint_granularity=selective",)),
}


@cache
def layout(name: str, *more: str) -> ParallelLayout:
    """Llama-3-8B's sizes with few layers, so that a test takes seconds."""
    processes, overrides = LAYOUTS[name]
    sizes = (
        f"model.architecture.num_hidden_layers={LAYERS}",
        "model.tensor_model_parallel_size=4",
        "model.sequence_parallel=true",
        "data.row_tokens=4096",
        "optim.use_distributed_optimizer=false",
        "optim.overlap_grad_reduce=false",
    )
    config = load_recipe("lmpo_llama3_8b", [*sizes, *overrides, *more])
    assert config.model.architecture is not None
    return validate(config, architecture_from_hf(config.model.architecture), processes)


@cache
def trace(name: str, rank: int = 0, *more: str, transformer_engine: bool = True) -> Trace:
    return trace_rank(layout(name, *more), rank, transformer_engine=transformer_engine)


def phase(found: Trace, name: str) -> Phase:
    return next(phase for phase in found.phases if phase.name == name)


def test_memory_of_weights_and_optimizer() -> None:
    """2 bytes of BF16 weight and 4 of gradient; 4 of main weight and 8 of moments."""
    parameters = (LAYERS * LAYER + 4096 + 2 * VOCABULARY) // 4 + (LAYERS * 2 + 1) * 4096 * 3 // 4
    found = trace("tp4")
    assert phase(found, MODEL).after == pytest.approx(6 * parameters, rel=1e-3)
    assert phase(found, OPTIMIZER).after == pytest.approx(18 * parameters, rel=1e-3)


def test_adamw_takes_nothing_for_itself_with_and_without_transformer_engine() -> None:
    for engine in (True, False):
        found = trace("tp4", transformer_engine=engine)
        parameters = phase(found, OPTIMIZER).after / 18
        assert phase(found, STEP).peak - phase(found, OPTIMIZER).after < 0.2 * parameters


def test_bfloat16_moments_take_half_and_are_float32_a_few_at_a_time() -> None:
    """14 bytes a parameter instead of 18; in the step 12 for each of 2^24 elements, and as much again at the seams."""
    found = trace("tp4", 0, ROUNDED)
    parameters = phase(trace("tp4"), OPTIMIZER).after / 18
    assert phase(found, OPTIMIZER).after == pytest.approx(14 * parameters, rel=1e-3)
    assert phase(found, STEP).peak - phase(found, OPTIMIZER).after < 20 * AT_A_TIME
    assert estimate_memory(layout("tp4", ROUNDED)).total == pytest.approx(found.peak, rel=0.05)
    more = sum(found.end_of_step.moved.values()) - sum(trace("tp4").end_of_step.moved.values())
    assert more == pytest.approx(ROUNDING_BYTES * parameters, rel=0.02)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_instant_dry_run_agrees(name: str) -> None:
    stages = layout(name).config.model.pipeline_model_parallel_size
    last = layout(name).world_size // stages * (stages - 1)
    executed = max(trace(name, rank).peak for rank in {0, last})
    assert estimate_memory(layout(name)).total == pytest.approx(executed, rel=0.05)


def test_the_instant_dry_run_agrees_without_transformer_engine() -> None:
    computed = estimate_memory(layout("tp4", "model.transformer_engine=false")).total
    assert computed == pytest.approx(trace("tp4", transformer_engine=False).peak, rel=0.05)


RELEASED = ("loss.compat=released_code",)
KTO = ("loss=kto", "model.reference_in_memory=true")
COUNTED = [
    *((name, (), True) for name in LAYOUTS),
    *(case for engine in (True, False) for case in (("tp4_recomputed", RELEASED, engine), ("tp4", KTO, engine))),
    ("tp4_pp2", RELEASED, True),
]


@pytest.mark.parametrize(("name", "loss", "engine"), COUNTED)
def test_the_plan_counts_what_is_executed(name: str, loss: tuple[str, ...], engine: bool) -> None:
    """Products and bytes sent are exact but for the vocabulary's padding; kernels and their bytes about right.

    Losses that go forward more often, too: for statistics, and with a second model for a reference.
    """
    of = layout(name, *loss)
    stages = of.config.model.pipeline_model_parallel_size
    found = trace(name, of.world_size // stages * (stages - 1), *loss, transformer_engine=engine)
    split = replace(split_of(of), fused=engine)
    counted = micro_batch_work(shape_of(of.architecture), split, found.row, last=True)
    executed = found.micro_batch
    assert counted.flops == pytest.approx(executed.flops, rel=0.01)
    for group in ("tensor", "context", "pipeline"):
        sent = [sum(bytes_ for (_, name), bytes_ in work.sent.items() if name == group) for work in (counted, executed)]
        assert sent[0] == pytest.approx(sent[1], rel=0.10, abs=1e6), group
    moved, split = sum(executed.moved.values()), split_of(layout(name))
    if split.shard == "all":
        # What the head's products add to the output matrix's gradient, chunk by chunk, is inside of products to the
        # trace. In other layouts the plan leaves the embedding's gradient out, which is about as much.
        moved += 8 * -(-found.row.predicted // split.chunk) * VOCABULARY // split.tensor
    assert sum(counted.moved.values()) == pytest.approx(moved, rel=0.2)
    assert counted.num_kernels == pytest.approx(executed.num_kernels, rel=0.15)


def test_gradients_are_added_inside_of_products_with_transformer_engine_only() -> None:
    """8 bytes per weight of the layers, for the 10 of a kernel that reads the gradient, too."""
    matrices = LAYERS * (LAYER - 2 * 4096) // 4
    inside, apart = (trace("tp4", transformer_engine=engine).micro_batch.moved for engine in (True, False))
    assert inside["gradients"] == 8 * matrices
    assert "gradients" not in apart
    assert apart["add_"] - inside["add_"] == pytest.approx(10 * matrices)


@pytest.mark.parametrize("setting", ["model.fp8=hybrid", "model.tp_comm_overlap=true"])
def test_what_only_layers_of_transformer_engine_do_is_refused(setting: str) -> None:
    given = layout("tp4", "trainer.precision=bf16", "logging.samples=0", setting)
    with pytest.raises(ConfigError, match=f"^{setting} cannot be traced: .* use dry_run=plan or dry_run=true"):
        trace_rank(given, 0, transformer_engine=True)


def test_recomputation_trades_memory_for_a_second_forward() -> None:
    """A third of the products of layers is forward; the head's, four of its own, are not computed again."""
    plain, recomputed = trace("tp4"), trace("tp4_recomputed")
    forward = 2.0 * LAYERS * (LAYER - 2 * 4096) / 4 * plain.row.tokens
    assert recomputed.micro_batch.flops - plain.micro_batch.flops == pytest.approx(forward, rel=1e-3)
    kept = [phase(found, FORWARD_BACKWARD).peak for found in (plain, recomputed)]
    assert kept[1] < kept[0]


def test_replicas_reduce_gradients_and_gather_weights() -> None:
    """Float32 gradients scattered and BF16 weights gathered, half of them each between two replicas."""
    found = trace("tp2_dp2")
    parameters = phase(found, MODEL).after / 6
    sent = found.forward_backward.plus(found.end_of_step).sent
    assert sent["reduce-scatter", "data"] == pytest.approx(4 * parameters / 2, rel=0.01)
    assert sent["all-gather", "data"] == pytest.approx(2 * parameters / 2, rel=0.01)


def test_fsdp_keeps_a_share_of_all_and_sends_layers_around() -> None:
    """16 bytes a parameter over 4 ranks: float32 weight, gradient, two moments.

    In a micro-batch, BF16 weights of layers and embedding are gathered twice, output matrix and final norm once, and
    float32 gradients are scattered once; a rank sends three quarters of each in a ring.
    """
    found, embedding = trace("fsdp4"), 128256 * 4096
    parameters = LAYERS * LAYER + 4096 + 2 * embedding
    assert phase(found, FORWARD_BACKWARD).after == pytest.approx(16 * parameters / 4, rel=1e-3)
    gathered = 2 * (LAYERS * LAYER + embedding) + embedding + 4096
    sent = found.micro_batch.sent
    assert sent["all-gather", "data"] == pytest.approx(2 * gathered * 3 / 4, rel=1e-3)
    assert sent["reduce-scatter", "data"] == pytest.approx(4 * parameters * 3 / 4, rel=1e-3)


def test_pairs_have_what_any_loss_wants() -> None:
    pair = filling_examples(load_recipe("lmpo_tiny"), 1)[0]
    known = [(response.reference_logp, response.reference_shared_logp) for response in pair.responses]
    assert len(known) == 2
    assert None not in sum(known, ())


def test_conversations_fill_a_row_and_have_their_share_of_predicted_tokens() -> None:
    config = load_recipe("sft_llama3_8b_ultrachat", ["data.row_tokens=4096"])
    examples = filling_examples(config, 2)
    assert len(examples) == 2 * 3
    (response,) = examples[0].responses
    used = len(examples[0].prompt_ids) + len(response.ids) - 1
    assert 4096 // 3 - 1 <= used <= 4096 // 3
    assert response.predicted == pytest.approx(len(response.ids) * 990 / 1075, abs=1)
    assert response.spans is not None
    assert response.spans[0][0] == 0
    assert response.spans[-1][1] == len(response.ids)
