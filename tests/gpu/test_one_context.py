"""A process that computes on its own GPU makes a context there and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.runtime.launch import LaunchInfo
from nemo_lmpo.training import run
from tests.conftest import REHEARSED
from tests.gpu.runs import BF16, SMALL

has_context: Any = getattr(torch._C, "_cuda_hasPrimaryContext", None)
SECOND = LaunchInfo(rank=0, world_size=1, local_rank=1, local_world_size=2)


def test_the_second_process_leaves_the_first_gpu_alone(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    driver = request.config.stash.get(REHEARSED, None)
    if driver is not None:
        driver.as_new()
    elif has_context(0):
        pytest.skip("other tests have used the first GPU already; run this file alone")
    # All that threads do: batches ahead, background writers, trackers, the watchdog, samples.
    busy = ("checkpoint.async_save=true", "checkpoint.save_interval=1", "logging.samples=1")
    steps = ("trainer.max_steps=2", "trainer.val_check_interval=1", "logging.sample_tokens=1")
    small = [part for part in SMALL if part.split("=")[0] not in {one.split("=")[0] for one in (*busy, *steps)}]
    run(
        load_recipe("lmpo_tiny", [*small, *BF16, *busy, *steps, "logging.tensorboard=true", f"run_dir={tmp_path}"]),
        SECOND,
    )
    try:
        assert has_context(1)
        if driver is not None:
            threads = {call.thread for call in driver.calls}
            assert any(name.startswith("next-batch") for name in threads), threads
            strays = {(call.thread, call.name) for call in driver.calls if call.device != 1}
            assert not strays, f"these were on the first GPU: {strays}"
        assert not has_context(0)
    finally:
        torch.cuda.set_device(0)
