"""Facts about the machine: versions, devices, kernels, memory, disk, batch job, environment."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import torch

from nemo_lmpo.config.schema import ModelConfig
from nemo_lmpo.doctor.findings import Finding
from nemo_lmpo.errors import ConfigError, counted
from nemo_lmpo.model.kernels import Kernels, choose_kernels, this_device
from nemo_lmpo.monitor.banner import detect_kernels, kernels_in_use, package_versions
from nemo_lmpo.runtime.batch_job import expired_end, read_batch_job
from nemo_lmpo.runtime.files import GIB
from nemo_lmpo.runtime.launch import LaunchInfo
from nemo_lmpo.sizing.cards import peak_flops

HEAD_DIM = 128
LEAST_DISK = 20 * GIB
"""A checkpoint of an 8 B model takes 112 GB; with less than this not even a small one is safe."""
_WATCHED = ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
_WATCHED_BEGINNINGS = ("NCCL_", "NVTE_", "TORCH_")


def versions() -> Iterator[Finding]:
    """Python and the packages that a run stands on."""
    yield Finding("versions", "python", platform.python_version())
    for name, version in package_versions().items():
        yield Finding("versions", name, version)
    if torch.version.cuda is not None:
        yield Finding("versions", "CUDA", f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")


def devices(launch: LaunchInfo) -> Iterator[Finding]:
    """GPUs, or that there are none; cores and main memory."""
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0))
    yield Finding(
        "devices", "host", f"{cores} cores, {memory.available / GIB:.0f} of {memory.total / GIB:.0f} GiB free"
    )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield Finding("devices", "GPU", "none; training runs on the CPU, for small models", "note")
        return
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        peak = peak_flops(name)
        speed = f", {peak / 1e12:.0f} TFLOP/s BF16" if peak else ", peak unknown (no MFU is logged)"
        kind = "fact" if free > 0.9 * total else "note"
        text = f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free{speed}"
        yield Finding("devices", f"GPU {index}", text, kind)  # type: ignore[arg-type]
    if launch.local_world_size > count:
        text = f"{launch.local_world_size} processes on this node, but {counted(count, 'GPU')}; start one per GPU"
        yield Finding("devices", "processes", text, "problem")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        text = "none; torch.compile, which fuses activations, needs one (or set TORCH_COMPILE_DISABLE=1)"
        yield Finding("devices", "C++ compiler", text, "problem")


def kernels(precision: str) -> tuple[list[Finding], Kernels | None]:
    """Which kernels a run would take, and why not faster ones."""
    device = this_device(use_cuda=torch.cuda.is_available())
    try:
        chosen = choose_kernels(ModelConfig(), precision=precision, head_dim=HEAD_DIM, device=device)
    except ConfigError as error:
        return [Finding("kernels", "choice", str(error), "problem")], None
    used = kernels_in_use(detect_kernels(), chosen)
    findings = [Finding("kernels", name, what) for name, what in used.items()]
    return [*findings, *(Finding("kernels", "why", reason, "note") for reason in chosen.reasons)], chosen


def disk(directory: Path) -> Iterator[Finding]:
    """Room for checkpoints, and shared memory."""
    place = directory.resolve()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        yield Finding("room", str(directory), f"{place} is not writable; choose another run_dir", "problem")
        return
    free = shutil.disk_usage(place).free
    few = free < LEAST_DISK
    remedy = "; a checkpoint takes 14 bytes per parameter" if few else ""
    yield Finding("room", str(directory), f"{free / GIB:.0f} GiB free{remedy}", "note" if few else "fact")


def job(environ: Mapping[str, str]) -> Iterator[Finding]:
    """The batch job, and what the environment sets for the libraries."""
    batch = read_batch_job(environ)
    if batch is None:
        yield Finding("job", "Slurm", "not in a job")
    else:
        left = f", {(batch.ends_at - time.time()) / 3600:.1f} h left" if batch.ends_at else ", no time limit known"
        yield Finding("job", "Slurm", f"job {batch.job_id}, restart {batch.restarts}{left}")
        if (expired := expired_end(environ)) is not None:
            yield Finding("job", "time limit", f"{expired} is in the past: this shell keeps it of another job", "note")
        if batch.directory is None:
            yield Finding("job", "requeueing", "not started by the templates in slurm/; it is not requeued", "note")
    for name, value in sorted(environ.items()):
        if name in _WATCHED or name.startswith(_WATCHED_BEGINNINGS):
            yield Finding("job", name, value)
