"""bfloat16 moments: every layout keeps and saves them, a resume rounds on, and a resume on purpose converts them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_lmpo.formats.archive import DirectoryFiles
from nemo_lmpo.formats.distributed_reader import DistributedCheckpoint
from nemo_lmpo.runtime.launch import LaunchInfo
from tests.distributed.test_layouts import assert_same_metrics_in_bfloat16
from tests.distributed.test_resume_across_layouts import BF16, FSDP, LENGTH, SHARDED, resume_elsewhere
from tests.distributed.training_runs import COMMON, metrics_of, train, weights_of
from tests.distributed.workers import WorkerError, run_workers

ROUNDED = "optim.moments_dtype=bf16"
ALLOWED = "checkpoint.allow_changes=[optim.moments_dtype]"
TP2 = "model.tensor_model_parallel_size=2"


def moments_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The checkpoint's moments, by name."""
    files = DirectoryFiles(run / "checkpoints" / f"step_{step:07d}")
    checkpoint = DistributedCheckpoint(files, "state")
    return {name: checkpoint.read(name) for name in checkpoint.tensors if ".exp_avg" in name}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    run_workers(1, train, str(run), (*LENGTH, BF16, ROUNDED))
    return run


@pytest.mark.parametrize(("world", "layout"), [(2, (SHARDED, BF16)), (2, (FSDP, BF16))])
def test_each_layout_trains_like_one_process_and_resumes_bit_for_bit(
    world: int, layout: tuple[str, ...], one: Path, tmp_path: Path
) -> None:
    run_workers(world, train, str(tmp_path / "whole"), (*LENGTH, *layout, ROUNDED))
    run = resume_elsewhere(tmp_path, (world, layout), (world, layout), (ROUNDED,))
    assert metrics_of(run)[-2:] == metrics_of(tmp_path / "whole")[-2:]
    expected = weights_of(tmp_path / "whole", 4)
    assert all(tensor.equal(expected[name]) for name, tensor in weights_of(run, 4).items())
    moments, whole = moments_of(run, 4), moments_of(tmp_path / "whole", 4)
    assert len(moments) > 10
    assert all(tensor.dtype == torch.bfloat16 and tensor.equal(whole[name]) for name, tensor in moments.items())
    assert_same_metrics_in_bfloat16(metrics_of(tmp_path / "whole"), metrics_of(one))


def loaded_moments(launch: LaunchInfo, run_dir: str, overrides: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The values of each moment of a session that has resumed, in order of their size."""
    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.training.session import open_session

    config = load_recipe("lmpo_tiny", [*COMMON, f"run_dir={run_dir}", "trainer.num_threads=1", *overrides])
    with open_session(config, launch) as session:
        session.trainer().resume()
        (inner,) = session.optimizer.chained_optimizers
        states = list(inner.optimizer.state.values())
        return {name: in_order([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq")}


def in_order(tensors: list[torch.Tensor]) -> np.ndarray:
    values: np.ndarray = torch.cat([tensor.reshape(-1) for tensor in tensors]).float().sort().values.numpy()
    moved: np.ndarray = values[values != 0]  # the vocabulary's padding has moments too, which are zero and not saved
    return moved


def test_moments_go_from_one_dtype_to_the_other_on_purpose_only(tmp_path: Path) -> None:
    """From float32 they are rounded to the nearest, once; from bfloat16 they are what they were."""
    run = tmp_path / "run"
    steps = ("optim.sched.name=constant", "checkpoint.keep_last=9", BF16)
    run_workers(2, train, str(run), (*steps, SHARDED, "trainer.max_steps=1"))
    with pytest.raises(WorkerError, match=r"optim\.moments_dtype"):
        run_workers(2, train, str(run), (*steps, TP2, ROUNDED, "trainer.max_steps=2"))
    for step, overrides in enumerate(((ROUNDED, ALLOWED), (ALLOWED,)), start=1):
        (found,) = run_workers(1, loaded_moments, str(run), (*steps, *overrides, "trainer.max_steps=9"))
        saved = moments_of(run, step)
        assert {tensor.dtype for tensor in saved.values()} == {(torch.float32, torch.bfloat16)[step - 1]}
        for name, values in found.items():
            kept = [tensor for key, tensor in saved.items() if f".{name}." in key]
            expected = in_order([tensor.bfloat16() for tensor in kept])
            assert len(values) > 1000
            assert np.array_equal(values, expected)
        run_workers(2, train, str(run), (*steps, TP2, *overrides, f"trainer.max_steps={step + 1}"))
