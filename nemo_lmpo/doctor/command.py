"""The command `nemo-lmpo doctor`: what this machine has for training, and whether it works; also under torchrun."""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Versions, devices, kernels, their results against float64, the network between the processes "
        "that are started, room and batch job, on one page. Ends with a verdict; status 1 if something is in the way.",
    )
    parser.add_argument("--precision", choices=("bf16", "32"), default="bf16", help="trainer.precision (default: bf16)")
    parser.add_argument("--directory", type=Path, default=Path("runs"), help="where runs are to write (default: runs)")
    parser.set_defaults(run=_run, own_signals=True)
    return parser


def _run(options: argparse.Namespace) -> int:
    warnings.simplefilter("ignore")
    import torch
    import torch.distributed as dist

    from nemo_lmpo.config.schema import Config
    from nemo_lmpo.doctor import machine
    from nemo_lmpo.doctor.findings import page
    from nemo_lmpo.doctor.network import network
    from nemo_lmpo.doctor.parity import parity
    from nemo_lmpo.runtime.command import answer
    from nemo_lmpo.runtime.launch import read_launch_info
    from nemo_lmpo.training.process import distributed_session

    launch = read_launch_info()
    findings = [*machine.versions(), *machine.devices(launch)]
    about_kernels, kernels = machine.kernels(options.precision)
    findings += about_kernels
    with distributed_session(Config(), launch) as (_, device):
        dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
        if kernels is not None:
            findings += parity(kernels, device, dtype)
        findings += [*network(device), *machine.disk(options.directory), *machine.job(os.environ)]
        everybody: list[list[object]] = [[] for _ in range(launch.world_size)]
        dist.all_gather_object(everybody, [found for found in findings if found.kind == "problem"])
    others = [found for rank, problems in enumerate(everybody) if rank != launch.rank for found in problems]
    if launch.is_main:
        answer(page([*findings, *others]))  # type: ignore[list-item]
    return 1 if any(everybody) else 0
