"""What a process sets before torch or CUDA starts, GPUs or CPUs, and how the C library keeps memory.

What the user set stays. This module imports no torch until it is asked which device there is.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import MutableMapping

from nemo_lmpo.errors import ConfigError
from nemo_lmpo.runtime.launch import LaunchInfo

_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
_BLACKWELL = 10
"""Major compute capability from which the order of kernels no longer rests on that variable."""
BEFORE_TORCH = {
    # Threads that wait for others sleep instead of burning a core: on a shared machine busy waiting makes steps up
    # to fourteen times slower (docs/architecture.md, CPU).
    "OMP_WAIT_POLICY": "passive",
    # Rows of changing length would leave holes between the fixed blocks of the allocator.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
_OLDER_NAMES = {"PYTORCH_ALLOC_CONF": "PYTORCH_CUDA_ALLOC_CONF"}
_VISIBLE = "CUDA_VISIBLE_DEVICES"

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_KEPT_BYTES = 1_000_000_000
_GROWTH_BYTES = 16 * 2**20


def prepare_environment(environ: MutableMapping[str, str] | None = None) -> None:
    """Set what torch reads when it is loaded, unless the user did."""
    environ = os.environ if environ is None else environ
    for name, value in BEFORE_TORCH.items():
        if _OLDER_NAMES.get(name, name) not in environ:
            environ.setdefault(name, value)


def order_kernels(
    *, fsdp: bool, splits_layers: bool, architecture: int | None, environ: MutableMapping[str, str] | None = None
) -> str | None:
    """Let kernels start in the order in which they were given where that is wanted; has to come before CUDA starts.

    Before Blackwell, megatron-core's overlap of communication with computation under tensor and context parallelism
    rests on that order. FSDP wants the opposite: what gathers the next layer would wait behind the computation of this
    one. What the user set stays.

    Args:
        fsdp: whether weights are gathered layer by layer.
        splits_layers: whether there is tensor or context parallelism.
        architecture: major compute capability of the machine's GPUs; None: not known.
        environ: unset: this process's.

    Returns:
        What the user should know of a layout that wants both.
    """
    environ = os.environ if environ is None else environ
    if architecture is not None and architecture >= _BLACKWELL:
        return None
    if not fsdp:
        environ.setdefault(_CONNECTIONS, "1")
        return None
    if environ.get(_CONNECTIONS) == "1":
        return (
            f"{_CONNECTIONS}=1 is set, and with model.fsdp=true what gathers a layer then waits behind the computation "
            f"before it; unset it"
        )
    if splits_layers and architecture is not None:
        return (
            f"model.fsdp=true leaves {_CONNECTIONS} unset, without which GPUs before Blackwell hide less of the "
            f"communication of tensor and context parallelism; compare with a layout that has one of the two "
            f"(nemo-lmpo plan)"
        )
    return None


def leave_out_compiler(environ: MutableMapping[str, str] | None = None) -> None:
    """Let megatron-core's import not load torch's compiler; has to come before megatron-core is imported.

    What it compiles are fused activations, which are taken on GPUs only; loading it takes a second of a CPU's start.
    """
    (os.environ if environ is None else environ).setdefault("TORCHDYNAMO_DISABLE", "1")


def hide_gpus(environ: MutableMapping[str, str] | None = None) -> None:
    """Let nothing in this process or its children find a GPU; has to come before the first one is looked for."""
    (os.environ if environ is None else environ)[_VISIBLE] = ""


def uses_gpu(accelerator: str, launch: LaunchInfo) -> bool:
    """Whether this process computes on a GPU, as `trainer.accelerator` and the machine have it.

    Raises:
        ConfigError: there is no GPU where one is asked for, or there are fewer than processes on this machine, or
            GPUs can no longer be hidden.
    """
    if accelerator == "cpu":
        hide_gpus()
    import torch

    available = torch.cuda.is_available()
    if accelerator == "cpu" and available:
        raise ConfigError(
            f"trainer.accelerator=cpu, but this process has looked for GPUs already; start it with {_VISIBLE}= (empty)"
        )
    if accelerator == "gpu" and not available:
        raise ConfigError(
            f"trainer.accelerator=gpu, but torch {torch.__version__} finds none ({_why_none()}); correct that, or set "
            f"trainer.accelerator=cpu"
        )
    if available and not _has_one_of_its_own(launch):
        count = torch.cuda.device_count()
        raise ConfigError(
            f"{launch.local_world_size} processes on this machine share {count} GPU(s); start at most {count} on a "
            f"machine, or set trainer.accelerator=cpu"
        )
    return available


def _has_one_of_its_own(launch: LaunchInfo) -> bool:
    """Whether GPUs suffice; srun may show each task the one that is bound to it."""
    import torch

    count = torch.cuda.device_count()
    bound = count == 1 and "SLURM_PROCID" in os.environ and "LOCAL_WORLD_SIZE" not in os.environ
    return bound or launch.local_world_size <= count


def _why_none() -> str:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return "it is built for CPUs only"
    if _VISIBLE in os.environ:
        return f"{_VISIBLE}={os.environ[_VISIBLE]!r}"
    return "there is no driver, or no device"


def keep_freed_memory() -> bool:
    """Let the C library reuse memory from step to step instead of returning every large tensor to the system.

    By default glibc maps each large allocation anew and unmaps it when it is freed; a step then spends an eighth of
    its time in page faults (SmolLM2-135M on two cores). At most 1 GB at the end of the heap stays unused.

    Returns:
        Whether the C library knows how (glibc does).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _KEPT_BYTES), (_TOP_PAD, _GROWTH_BYTES))
    return all(mallopt(parameter, value) for parameter, value in settings)
