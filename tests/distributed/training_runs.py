"""What the layout tests run in their workers: the real training session on the tiny recipe."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from nemo_lmpo.runtime.launch import LaunchInfo

COMMON = (
    "model.architecture.hidden_size=64",
    "model.architecture.intermediate_size=128",
    "model.global_batch_size=12",
    "data.row_tokens=160",
    "data.validation.limit=10",
    "trainer.max_steps=3",
    "trainer.val_check_interval=0",
    "checkpoint.save_interval=0",
    "optim.sched.warmup_fraction=0",
    # Adam divides by the gradient's size: with the default 1e-8, a gradient that is rounding noise would move its
    # weight as far as a real one.
    "optim.eps=1e-5",
    "logging.tensorboard=false",
    "logging.report=false",
    "logging.progress_bar=false",
)


def train(launch: LaunchInfo, run_dir: str, overrides: tuple[str, ...], archive: str | None = None) -> dict[str, Any]:
    """Train, and save the policy as ``archive``; the running statistics that this rank ends with."""
    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.training.session import open_session

    config = load_recipe("lmpo_tiny", [*COMMON, f"run_dir={run_dir}", "trainer.num_threads=1", *overrides])
    with open_session(config, launch) as session:
        session.train(time.time())
        if archive is not None:
            session.files.save_to(archive)
        statistics = session.policy.statistics
        return statistics.state_dict() if statistics is not None else {}


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    """Lines of metrics.jsonl without what depends on the clock or the machine."""
    volatile = (
        "time",
        "step_seconds",
        "pairs_per_second",
        "conversations_per_second",
        "answers_per_second",
        "tokens_per_second",
        "memory/peak",
        "data/imbalance",
    )
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in volatile and not name.startswith("checkpoint/")}
        for line in lines
    ]


def weights_of(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """The checkpoint's weights as Hugging Face tensors, whole, whatever layout wrote them."""
    from nemo_lmpo.formats.architecture import architecture_from_hf
    from nemo_lmpo.formats.archive import DirectoryFiles
    from nemo_lmpo.formats.distributed_reader import DistributedCheckpoint
    from nemo_lmpo.formats.megatron import MegatronSource

    directory = run_dir / "checkpoints" / f"step_{step:07d}"
    architecture = architecture_from_hf(json.loads((directory / "architecture.json").read_text()))
    source = MegatronSource(DistributedCheckpoint(DirectoryFiles(directory), "state"), architecture)
    return {name: source.get(name) for name in source.names()}
