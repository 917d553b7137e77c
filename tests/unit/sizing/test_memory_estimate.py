"""The dry run's memory table against arithmetic done by hand, for Llama-3-8B in BF16 on four GPUs."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.config.rules import validate
from nemo_lmpo.config.schema import Config
from nemo_lmpo.formats.architecture import Architecture, architecture_from_hf
from nemo_lmpo.sizing.memory import (
    MemoryEstimate,
    activation_bytes,
    adapter_parameters,
    estimate_memory,
)
from nemo_lmpo.training.start_model import find_start_model

# 32 layers of 4096 x (4096 + 2 x 1024) + 4096 x 4096 + 3 x 4096 x 14336 + 2 x 4096, the final norm, and two matrices
# of 128256 x 4096, which a tensor-parallel size of 4 pads to 128512 rows.
LAYER = 4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336 + 2 * 4096
VOCABULARY = 128512 * 4096
ROW = 4096
# Bytes a token and layer: four hidden states; QKV, queries, output (6144 + 2 x 4096) and 3 x 14336 of the MLP.
OUTSIDE, INSIDE = 4 * 4096 * 2, (6144 + 2 * 4096 + 3 * 14336) * 2
LAYER_INPUT = 4096 * 2
LAYOUT = (
    "model.tensor_model_parallel_size=4",
    "model.sequence_parallel=true",
    "data.row_tokens=4096",
    "optim.use_distributed_optimizer=false",
    "optim.overlap_grad_reduce=false",
)


def estimate(*overrides: str, recipe: str = "lmpo_llama3_8b", processes: int = 4) -> MemoryEstimate:
    config, architecture = setting(recipe, *overrides)
    return estimate_memory(validate(config, architecture, processes))


def setting(recipe: str, *overrides: str) -> tuple[Config, Architecture]:
    config = load_recipe(recipe, [*LAYOUT, *overrides])
    assert config.model.architecture is not None
    return config, architecture_from_hf(config.model.architecture)


def activations(**model: Any) -> float:
    overrides = [f"model.{name}={value}" for name, value in model.items()]
    config, architecture = setting("lmpo_llama3_8b", *overrides)
    return activation_bytes(architecture, config, ROW)


def test_tensor_parallel_four() -> None:
    found = estimate()
    parameters = (32 * LAYER + 4096 + 2 * VOCABULARY) / 4
    assert found.parameters == pytest.approx(2 * parameters)
    assert found.gradients == pytest.approx(4 * parameters)
    assert found.optimizer == pytest.approx(12 * parameters)
    assert found.activations == pytest.approx(ROW * 32 * (OUTSIDE + INSIDE) / 4)
    assert found.logits == pytest.approx(6 * 4096 * 128512 / 4 + 2 * VOCABULARY / 4)
    assert found.reference == 0
    assert found.total == pytest.approx(18 * parameters + found.activations + found.logits)


def test_distributed_optimizer_is_shared_by_replicas() -> None:
    whole, shared = (
        estimate(f"optim.use_distributed_optimizer={on}", "trainer.num_nodes=2", processes=8) for on in (False, True)
    )
    assert shared.optimizer == pytest.approx(whole.optimizer / 2)
    assert shared.gradients == whole.gradients


def test_fsdp_shares_weights_gradients_and_optimizer() -> None:
    """16 bytes a parameter over four ranks; float32 weights need no main copy.

    Whole at a time: the output matrix in BF16 with its gradient in float32, at the end in BF16 once more, when the
    float32 logits are free.
    """
    found = estimate("model.fsdp=true", "model.tensor_model_parallel_size=1", "model.sequence_parallel=false")
    matrix = 128256 * 4096
    parameters = 32 * LAYER + 4096 + 2 * matrix
    assert found.parameters == found.gradients == pytest.approx(4 * parameters / 4)
    assert found.optimizer == pytest.approx(8 * parameters / 4)
    assert found.logits == 6 * 1024 * 128256
    assert found.gathered == pytest.approx((2 + 4) * matrix + 2 * matrix - 4 * 1024 * 128256)
    assert found.total == pytest.approx(4 * parameters + found.activations + found.logits + found.gathered)


def test_fsdp_holds_a_layer_and_the_one_before_where_the_vocabulary_is_small() -> None:
    """A layer's weights and gradients and the next layer's weights, beside the output matrix and its gradient."""
    small = ("model.architecture.vocab_size=1024", "data.row_tokens=4096", "model.logprob_chunk_tokens=256")
    found = estimate("model.fsdp=true", "model.tensor_model_parallel_size=1", "model.sequence_parallel=false", *small)
    layer = LAYER + 4096 / 32
    assert found.gathered + found.logits == pytest.approx(2 * 2 * 1024 * 4096 + 3 * 2 * layer)


def test_fsdp_shares_a_reference_and_a_frozen_base() -> None:
    alone = ("model.fsdp=true", "model.tensor_model_parallel_size=1", "model.sequence_parallel=false")
    parameters = 32 * LAYER + 4096 + 2 * 128256 * 4096
    with_reference = estimate(*alone, "model.reference_in_memory=true", recipe="dpo_llama3_8b")
    assert with_reference.reference == pytest.approx(2 * parameters / 4)
    lora = estimate(*alone, "model.peft.name=lora")
    config, architecture = setting("lmpo_llama3_8b", *alone)
    adapters = adapter_parameters(architecture, config)
    assert lora.parameters == pytest.approx((2 * parameters + 4 * adapters) / 4)
    assert lora.optimizer == 8 * adapters / 4


def test_reference_in_memory_is_one_more_copy_of_the_weights() -> None:
    found = estimate("model.reference_in_memory=true", recipe="dpo_llama3_8b")
    assert found.reference == found.parameters
    assert found.total - estimate(recipe="dpo_llama3_8b").total == pytest.approx(found.parameters)


def test_sequence_parallel_splits_the_rest() -> None:
    assert activations(sequence_parallel="false") == pytest.approx(ROW * 32 * (OUTSIDE + INSIDE / 4))


def test_first_pipeline_stage_holds_a_row_for_each_stage() -> None:
    """As much as without a pipeline: a quarter of the layers for four rows."""
    found = activations(tensor_model_parallel_size=1, sequence_parallel="false", pipeline_model_parallel_size=4)
    assert found == pytest.approx(ROW * 32 * (OUTSIDE + INSIDE))


def test_interleaved_stages_hold_more() -> None:
    """Four stages of four chunks: 2 x 3 + 3 x 4 warm-up passes and one more, of two layers each."""
    found = activations(
        tensor_model_parallel_size=1,
        sequence_parallel="false",
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=4,
    )
    assert found == pytest.approx(ROW * 19 * 2 * (OUTSIDE + INSIDE))


@pytest.mark.parametrize(
    ("method", "num_layers", "inputs", "whole"),
    [("uniform", 1, 32, 1), ("uniform", 4, 8, 4), ("block", 1, 1, 32), ("block", 30, 30, 3), ("block", 100, 32, 1)],
)
def test_full_recompute(method: str, num_layers: int, inputs: int, whole: int) -> None:
    """Kept inputs of recomputed units, and whole layers: those not recomputed and the unit under way."""
    found = activations(
        activations_checkpoint_granularity="full",
        activations_checkpoint_method=method,
        activations_checkpoint_num_layers=num_layers,
    )
    assert found == pytest.approx(ROW * (inputs * LAYER_INPUT + whole * (OUTSIDE + INSIDE)) / 4)


def test_context_parallel_splits_rows() -> None:
    assert activations(context_parallel_size=2) == pytest.approx(activations() / 2)


def test_adapters_on_experts_by_hand() -> None:
    """Rank 16 on all projections of a Qwen3-30B-A3B whose experts lie on eight ranks, each in two parts."""
    layout = ("model.expert_model_parallel_size=8", "model.expert_tensor_parallel_size=2", "trainer.devices=16")
    one = (
        "model.tensor_model_parallel_size=1",
        "model.sequence_parallel=false",
        "optim.use_distributed_optimizer=true",
    )
    stages = ("model.pipeline_model_parallel_size=1", "model.virtual_pipeline_model_parallel_size=null")
    config = load_recipe(
        "lmpo_qwen3_30b_a3b",
        ["model.peft.name=lora", "model.peft.rank=16", *layout, *one, *stages, "trainer.num_nodes=1"],
    )
    architecture = find_start_model(config.model, fetch=False).architecture
    # q and o: 2048 + 4096; k and v: 2048 + 512. Of 16 experts: gate, up and down, 2048 + 768 / 2 each.
    attention, experts = 48 * 16 * (2 * 6144 + 2 * 2560), 48 * 16 * 16 * 3 * 2432
    assert adapter_parameters(architecture, config) == attention + experts
    memory = estimate_memory(validate(config, architecture, 16))
    assert memory.gradients == 4 * (attention + experts)
    # Sixteen ranks share those on attention; each part of an expert is on one.
    assert memory.optimizer == pytest.approx(12 * (attention / 16 + experts))


def test_adapters_of_llama3_8b_by_hand() -> None:
    """Rank 16 on all projections of an 8B: 41.9 million parameters, as PEFT counts them."""
    config = load_recipe(
        "lmpo_llama3_8b",
        [
            "model.peft.name=lora",
            "model.peft.rank=16",
            "trainer.devices=1",
            "model.tensor_model_parallel_size=1",
            "model.sequence_parallel=false",
            "data.row_tokens=4096",
        ],
    )
    architecture = find_start_model(config.model, fetch=False).architecture
    # q and o: 4096 + 4096; k and v: 4096 + 1024; gate, up and down: 4096 + 14336; 32 layers.
    by_hand = 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert by_hand == 41_943_040
    assert adapter_parameters(architecture, config) == by_hand
    memory = estimate_memory(validate(config, architecture, 1))
    assert memory.gradients == 4 * by_hand
    assert memory.optimizer == 12 * by_hand
    assert 2 * 8.03e9 < memory.parameters < 2 * 8.1e9 + 2 * by_hand
    assert memory.total < 44 * 2**30  # one GPU of 48 GB; full training needs more than 128 GiB
