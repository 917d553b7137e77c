"""A checkpoint of any layout goes on in any other one, optimizer and margin statistics included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_layouts import RELATIVE, assert_same_metrics, assert_same_weights
from tests.distributed.training_runs import metrics_of, train, weights_of
from tests.distributed.workers import run_workers

TP2 = "model.tensor_model_parallel_size=2"
PP2 = "model.pipeline_model_parallel_size=2"
VPP2 = "model.virtual_pipeline_model_parallel_size=2"
CP2 = "model.context_parallel_size=2"
SHARDED = "optim.use_distributed_optimizer=true"
FSDP = "model.fsdp=true"
BF16 = "trainer.precision=bf16"
LENGTH = ("trainer.max_steps=4", "optim.sched.name=constant", "checkpoint.save_interval=2", "checkpoint.keep_last=9")
CHANGES = {
    "tp2_to_pp2_vpp2": (2, (TP2,), 2, (PP2, VPP2)),
    "pp2_vpp2_to_one": (2, (PP2, VPP2), 1, ()),
    "sharded_dp2_to_tp2": (2, (SHARDED,), 2, (TP2,)),
    "one_to_sharded_dp2": (1, (), 2, (SHARDED,)),
    "fsdp3_to_tp2": (3, (FSDP,), 2, (TP2,)),
    "tp2_pp2_to_tp2_fsdp2": (4, (TP2, PP2), 4, (TP2, FSDP)),
    "fsdp2_to_fsdp4": (2, (FSDP,), 4, (FSDP,)),
    "cp2_to_tp2_pp2": (2, (CP2,), 4, (TP2, PP2)),
}


def resume_elsewhere(
    directory: Path, first: tuple[Any, ...], second: tuple[Any, ...], extra: tuple[str, ...] = ()
) -> Path:
    """Two steps in one layout, two more in another, in the same run directory."""
    (world, overrides), (other_world, other_overrides) = first, second
    run = directory / "moved"
    run_workers(world, train, str(run), (*LENGTH, *extra, *overrides, "trainer.max_steps=2"))
    run_workers(other_world, train, str(run), (*LENGTH, *extra, *other_overrides))
    return run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    run_workers(1, train, str(run), LENGTH)
    return run


@pytest.mark.parametrize("change", CHANGES)
def test_goes_on_as_if_nothing_had_happened(change: str, uninterrupted: Path, tmp_path: Path) -> None:
    world, overrides, other_world, other_overrides = CHANGES[change]
    run = resume_elsewhere(tmp_path, (world, overrides), (other_world, other_overrides))
    training = [line for line in metrics_of(run) if "loss" in line]
    assert_same_metrics(training, [line for line in metrics_of(uninterrupted) if "loss" in line])
    assert_same_weights(weights_of(run, 4), weights_of(uninterrupted, 4), RELATIVE)


@pytest.mark.parametrize(("first", "second"), [(SHARDED, TP2), (SHARDED, FSDP), (FSDP, SHARDED)])
def test_bfloat16_main_parameters_survive_a_change_of_layout(first: str, second: str, tmp_path: Path) -> None:
    """Main parameters hold what bfloat16 weights cannot; losing them would show as a jump of half an ulp.

    Tolerance: bfloat16 has 8 significant bits, so one rounding is 2^-9 relative; a loss is a mean over pairs of
    sums that average such roundings, and two layouts round partial sums apart once a layer (4 layers).
    """
    whole = tmp_path / "whole"
    run_workers(1, train, str(whole), (*LENGTH, BF16))
    run = resume_elsewhere(tmp_path, (2, (first,)), (2, (second,)), (BF16,))
    losses, expected = (
        [line["loss"] for line in metrics_of(directory) if "loss" in line] for directory in (run, whole)
    )
    assert losses == pytest.approx(expected, rel=4 * 2.0**-9)
    assert_same_weights(weights_of(run, 4), weights_of(whole, 4), 4 * 2.0**-9)


def test_same_layout_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run_workers(2, train, str(whole), (*LENGTH, TP2))
    run = resume_elsewhere(tmp_path, (2, (TP2,)), (2, (TP2,)))
    assert metrics_of(run)[-2:] == metrics_of(whole)[-2:]
    found, expected = weights_of(run, 4), weights_of(whole, 4)
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
