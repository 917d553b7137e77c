"""Mixtures of experts: every layout gives the numbers of one process, with the term that balances experts.

`make fuzz` has all combinations; here are those that differ in what communicates.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.mixture_runs import EP, FSDP, TP, assert_equal_runs, balance, run

LAYOUTS = {
    # Whole experts on the ranks of tensor parallelism, which each compute other tokens.
    "tp2_sequence": (2, TP, "global_batch"),
    "tp2_sequence_dp2_ep2_etp2_distributed_optimizer": (
        4,
        (*TP, *EP, "model.expert_tensor_parallel_size=2", "optim.use_distributed_optimizer=true"),
        "global_batch",
    ),
    # Sequences lie on several ranks.
    "cp2_ep2_recompute": (
        2,
        (*EP, "model.context_parallel_size=2", "model.activations_checkpoint_granularity=full"),
        "sequence",
    ),
    # torch's fully sharded weights, on ranks that hold parts of the same experts.
    "tp2_dp2_etp2_fsdp": (4, (*TP, *FSDP, "model.expert_tensor_parallel_size=2"), "global_batch"),
    "pp2_dp2_ep2": (4, (*EP, "model.pipeline_model_parallel_size=2"), "sequence"),
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("one")
    return {kind: run(1, directory / kind, balance(kind)) for kind in ("global_batch", "sequence")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_one_process(layout: str, one_process: dict[str, Path], tmp_path: Path) -> None:
    size, overrides, kind = LAYOUTS[layout]
    found = run(size, tmp_path / "run", (*balance(kind), *overrides))
    assert_equal_runs(found, one_process[kind])


def test_what_routers_are_told(one_process: dict[str, Path], tmp_path: Path) -> None:
    """Neither packing nor sharing of prompts is seen; and the term changes what is learned."""
    for overrides in (("model.micro_batch_size=1",), ("data.share_prompt=false",)):
        found = run(1, tmp_path / overrides[0].partition("=")[0], (*balance("sequence"), *overrides))
        assert_equal_runs(found, one_process["sequence"])
    with pytest.raises(AssertionError):
        assert_equal_runs(one_process["global_batch"], one_process["sequence"])
