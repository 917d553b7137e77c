"""Pinned host memory of a save against the blocks that PyTorch takes for each tensor of Llama 3 8B."""

from __future__ import annotations

import math

import pytest

from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.config.rules import ParallelLayout, validate
from nemo_lmpo.formats.architecture import architecture_from_hf
from nemo_lmpo.sizing.host_memory import background_bytes, block_bytes, foreground_bytes, offloaded_bytes

# Queries, keys and values; attention's output; gate, up and down; two norms a layer; two vocabulary matrices.
TENSORS = [(6144 * 4096, 32), (4096 * 4096, 32), (14336 * 4096, 3 * 32), (4096, 2 * 32), (128256 * 4096, 2)]


def layout_of(nodes: int, *overrides: str) -> ParallelLayout:
    config = load_recipe("lmpo_llama3_8b", overrides)
    assert config.model.architecture is not None
    return validate(config, architecture_from_hf(config.model.architecture), 4 * nodes)


def blocks(size: int, cut: int) -> float:
    """Bytes of all blocks where each tensor lies in so many parts; a norm is cut in no part, and counts for nothing."""
    total: float = sum(cut * 2 ** math.ceil(math.log2(number * size / cut)) * times for number, times in TENSORS)
    return total


@pytest.mark.parametrize(
    ("overrides", "nodes", "cut", "weights", "states"),
    [
        # Of all weights and of all of the optimizer's state, the part that the busiest node writes.
        ((), 1, 2, 1, 1),
        (("trainer.num_nodes=2",), 2, 2, 1, 0.5),
        (("optim.use_distributed_optimizer=false",), 1, 2, 1, 1),
        (("trainer.num_nodes=2", "optim.use_distributed_optimizer=false"), 2, 2, 1, 1),
        (("model.tensor_model_parallel_size=4",), 1, 4, 1, 1),
        (("model.fsdp=true",), 1, 4, 1, 1),
        (("trainer.num_nodes=2", "model.fsdp=true"), 2, 8, 0.5, 0.5),
        (("trainer.num_nodes=2", "model.pipeline_model_parallel_size=2"), 2, 2, 0.5, 0.5),
    ],
)
def test_in_the_background_all_tensors_are_held(
    overrides: tuple[str, ...], nodes: int, cut: int, weights: float, states: float
) -> None:
    plain = ["optim.use_distributed_optimizer=false", "optim.overlap_grad_reduce=false"]
    given = [*overrides, *(plain if "model.fsdp=true" in overrides else ())]
    if "model.tensor_model_parallel_size=4" in given:
        given += plain
    expected = weights * blocks(2, cut) + 3 * states * blocks(4, cut)
    assert background_bytes(layout_of(nodes, *given)) == pytest.approx(expected, rel=0.01)


def test_while_training_waits_each_writer_holds_a_block_of_each_size() -> None:
    """TP 2: blocks of 2^25 (queries, keys, values), 2^24, 2^26, 2^29 and 2^13 bytes, twice that in float32."""
    sizes = {2**25, 2**24, 2**26, 2**29, 2**13} | {2**26, 2**25, 2**27, 2**30, 2**14}
    assert foreground_bytes(layout_of(1)) == 4 * 2 * sum(sizes)


def test_an_optimizer_on_the_host_has_its_gradients_there_too() -> None:
    """12 bytes of states per parameter, once for all replicas of both halves, and pinned float32 gradients."""
    parameters = sum(number * times for number, times in TENSORS)
    assert offloaded_bytes(layout_of(1)) == 0
    found = offloaded_bytes(layout_of(1, "optim.cpu_offload=true"))
    assert found == pytest.approx(12 * parameters + blocks(4, 2), rel=0.01)
    assert offloaded_bytes(layout_of(2, "optim.cpu_offload=true", "trainer.num_nodes=2")) == pytest.approx(found / 2)


def test_blocks_are_powers_of_two() -> None:
    assert [block_bytes(size) for size in (1, 2, 3, 4096, 4097)] == [1, 2, 4, 4096, 8192]
