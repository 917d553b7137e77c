"""`trainer.deterministic`: the same bits from the same state, and torch left as it was."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_lmpo.runtime.launch import LaunchInfo
from tests.distributed.training_runs import metrics_of, train, weights_of
from tests.distributed.workers import run_workers


def train_deterministically(launch: LaunchInfo, run_dir: str) -> tuple[bool, str | None]:
    """Train; whether torch refused other kernels while it ran, and what Transformer Engine would have read."""
    import os

    from nemo_lmpo.training import policy

    seen: list[tuple[bool, str | None]] = []
    finish = policy.Policy.finish_training_step

    def finish_and_look(self: policy.Policy) -> None:
        allowed = os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO")
        seen.append((torch.are_deterministic_algorithms_enabled(), allowed))
        assert self.models[0].config.deterministic_mode
        finish(self)

    policy.Policy.finish_training_step = finish_and_look  # type: ignore[method-assign]
    train(launch, run_dir, ("trainer.deterministic=true",))
    assert not torch.are_deterministic_algorithms_enabled()
    return seen[0]


def test_twice_the_same_bits(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("first", "second")]
    for run in runs:
        assert run_workers(2, train_deterministically, str(run)) == [(True, "0")] * 2
    first, second = (metrics_of(run) for run in runs)
    assert first == second
    weights = [weights_of(run, 3) for run in runs]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
