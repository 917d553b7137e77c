"""Weights that are gathered behind forward are whole before anything reads them, which a missing wait shows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from nemo_lmpo.runtime.launch import LaunchInfo
from tests.distributed.test_layouts import RELATIVE, assert_same_metrics, assert_same_weights
from tests.distributed.training_runs import metrics_of, train, weights_of
from tests.distributed.workers import WorkerError, run_workers

SHARED = ("optim.use_distributed_optimizer=true", "optim.overlap_grad_reduce=true", "optim.overlap_param_gather=true")
# Without a validation in between, which would gather what the checkpoint reads.
ALL = ("model.architecture.tie_word_embeddings=false", "data.validation.path=null")
STEPS = 3
BUCKET = 4000
"""Elements: each matrix is alone in one, where the defaults would put this small model into a single one."""


def _no_wait_for_the_head(patch: pytest.MonkeyPatch) -> None:
    from nemo_lmpo.training import optimizer

    patch.setattr(optimizer, "gather_weights", lambda chunks: None)


def _no_wait_for_the_checkpoint(patch: pytest.MonkeyPatch) -> None:
    from nemo_lmpo.training.policy import Policy

    patch.setattr(Policy, "whole_models", lambda policy: policy.models)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the head": _no_wait_for_the_head,
    "the checkpoint": _no_wait_for_the_checkpoint,
}


def train_in_buckets(launch: LaunchInfo, run_dir: str, overrides: tuple[str, ...], fault: str | None) -> None:
    from megatron.core import distributed

    with pytest.MonkeyPatch.context() as patch:
        buckets = partial(distributed.DistributedDataParallelConfig, bucket_size=BUCKET)
        patch.setattr(distributed, "DistributedDataParallelConfig", buckets)
        if fault is not None:
            FAULTS[fault](patch)
        train(launch, run_dir, overrides)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    run_workers(1, train, str(run), ALL)
    return run


def compare(run: Path, one: Path) -> None:
    assert_same_metrics(metrics_of(run), metrics_of(one))
    assert_same_weights(weights_of(run, STEPS), weights_of(one, STEPS), RELATIVE)


def test_trains_like_one_process(one: Path, tmp_path: Path) -> None:
    run_workers(2, train_in_buckets, str(tmp_path / "run"), (*SHARED, *ALL), None)
    compare(tmp_path / "run", one)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_missing_wait_is_seen(fault: str, one: Path, tmp_path: Path) -> None:
    def train_and_compare() -> None:
        run_workers(2, train_in_buckets, str(tmp_path / "run"), (*SHARED, *ALL), fault)
        compare(tmp_path / "run", one)

    with pytest.raises((AssertionError, WorkerError)):
        train_and_compare()
