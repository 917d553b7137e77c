"""What the banner shows of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from nemo_lmpo.errors import counted
from nemo_lmpo.monitor.banner import BannerFacts, detect_kernels, kernels_in_use, package_versions

if TYPE_CHECKING:
    from pathlib import Path

    from nemo_lmpo.training.policy import Policy


def banner_facts(policy: Policy, run_dir: Path, *, total_steps: int, start_step: int, examples: str) -> BannerFacts:
    """Machine, layout, model and versions of a run that is about to start."""
    world_size = dist.get_world_size()
    if policy.device.type == "cuda":
        devices = f"{world_size} x {torch.cuda.get_device_name()}"
    else:
        devices = f"CPU, {counted(world_size, 'process')} of {counted(torch.get_num_threads(), 'thread')}"
    return BannerFacts(
        config=policy.config,
        run_dir=str(run_dir),
        devices=devices,
        world_size=world_size,
        parameters=policy.architecture.num_parameters(),
        parameters_per_rank=policy.num_local_parameters(),
        total_steps=total_steps,
        data_parallel=policy.groups.data.size(),
        start_step=start_step,
        examples=examples,
        kernels=kernels_in_use(detect_kernels(), policy.kernels, moments_dtype=policy.config.optim.moments_dtype),
        reasons=policy.kernels.reasons,
        versions=package_versions(),
    )
