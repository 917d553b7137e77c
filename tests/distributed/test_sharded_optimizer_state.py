"""What data-parallel ranks share is saved where it lies: no rank gathers another's, and it resumes bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.runtime.launch import LaunchInfo
from tests.distributed.test_resume_across_layouts import BF16, FSDP, LENGTH, SHARDED, resume_elsewhere
from tests.distributed.training_runs import COMMON, metrics_of, train, weights_of
from tests.distributed.workers import run_workers

ASYNC = "checkpoint.async_save=true"
TP2 = "model.tensor_model_parallel_size=2"


@pytest.mark.parametrize(
    ("world", "overrides", "saving"),
    [(2, (SHARDED, BF16), ()), (4, (SHARDED, TP2), ()), (2, (FSDP, BF16), ()), (4, (FSDP, TP2), (ASYNC,))],
)
def test_same_layout_resumes_bit_for_bit(
    world: int, overrides: tuple[str, ...], saving: tuple[str, ...], tmp_path: Path
) -> None:
    """Only the part that is resumed from saves in the background: each of its writers imports all anew."""
    run_workers(world, train, str(tmp_path / "whole"), (*LENGTH, *overrides))
    run = resume_elsewhere(tmp_path, (world, (*overrides, *saving)), (world, overrides))
    assert metrics_of(run)[-2:] == metrics_of(tmp_path / "whole")[-2:]
    found, expected = weights_of(run, 4), weights_of(tmp_path / "whole", 4)
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def shares(launch: LaunchInfo, run_dir: str) -> tuple[int, int, int, bool]:
    """Elements of moments that this rank writes and keeps, the parameters' number, and whether it writes its own."""
    import torch

    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.training.session import open_session

    config = load_recipe("lmpo_tiny", [*COMMON, f"run_dir={run_dir}", "trainer.num_threads=1", SHARDED])
    with open_session(config, launch) as session:
        session.trainer().train_step(0)
        (inner,) = session.optimizer.chained_optimizers
        kept = [state["exp_avg"] for state in inner.optimizer.state.values()]
        state: dict[str, Any] = session.sharded_state(None)["optimizer"]["0"]
        written = [box.data for tensors in state.values() for box in tensors["exp_avg"]]
        storages = {tensor.untyped_storage().data_ptr() for tensor in kept}
        in_place = all(tensor.untyped_storage().data_ptr() in storages for tensor in written)
        number = sum(torch.numel(tensor) for tensor in session.policy.models[0].parameters())
        return sum(map(torch.numel, written)), sum(map(torch.numel, kept)), number, in_place


def test_every_rank_writes_its_own_shard_without_a_copy(tmp_path: Path) -> None:
    (first, second) = run_workers(2, shares, str(tmp_path / "run"))
    for written, kept, _, in_place in (first, second):
        assert written == kept
        assert in_place
    assert first[0] + second[0] == first[2]
