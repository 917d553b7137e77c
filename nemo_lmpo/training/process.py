"""This process as part of a job: groups, device and threads for as long as a run lasts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nemo_lmpo.config.schema import Config
from nemo_lmpo.monitor.watchdog import watched
from nemo_lmpo.parallel.groups import ParallelGroups, create_groups, destroy_groups, start_process_group
from nemo_lmpo.runtime.cpu_adapter import ADAPTER
from nemo_lmpo.runtime.environment import keep_freed_memory, uses_gpu
from nemo_lmpo.runtime.launch import LaunchInfo, refuse_few_open_files
from nemo_lmpo.runtime.peers import Peers


@contextmanager
def distributed_session(config: Config, launch: LaunchInfo) -> Iterator[tuple[ParallelGroups, torch.device]]:
    """Process groups and the device for a block; on machines without GPUs through the CPU adapter.

    Communicates: joins the job, and leaves it when the block ends well.

    Raises:
        TrainingError: another rank ended or does not answer; names it.
        ConfigError: too few files may be open.
    """
    device = prepare_device(config, launch)
    refuse_few_open_files(launch.world_size)
    start_process_group(launch, use_cuda=device.type == "cuda", timeout_minutes=config.trainer.distributed_timeout)
    try:
        peers = Peers.meet()
        try:
            with watched("joining the job", config.trainer.step_timeout):
                groups = create_groups(config.model, timeout_minutes=config.trainer.distributed_timeout)
            yield groups, device
        except BaseException as error:
            if launch.world_size > 1:
                lost = peers.explain(error)
                peers.leave_reason(error)
                if lost is not None:
                    raise lost from error
            raise
        # After an error on one of several ranks the others wait in a collective, and leaving a group in order may wait
        # for them: the process ends with its groups instead.
        destroy_groups()
    finally:
        if launch.world_size == 1:
            destroy_groups()
        torch.use_deterministic_algorithms(False)
        if device.type == "cpu":
            ADAPTER.uninstall()


def prepare_device(config: Config, launch: LaunchInfo) -> torch.device:
    """This process's GPU, or the CPU with what megatron-core needs there.

    Raises:
        ConfigError: `trainer.accelerator` cannot be had.
    """
    if config.trainer.deterministic:
        make_deterministic()
    if uses_gpu(config.trainer.accelerator, launch):
        return torch.device("cuda", launch.local_rank % torch.cuda.device_count())
    ADAPTER.install()
    keep_freed_memory()
    torch.set_num_threads(threads_per_process(config, launch))
    return torch.device("cpu")


def make_deterministic() -> None:
    """Only kernels that give the same bits every time, or an error where there is none.

    Flash attention's backward, sums over an index and cuBLAS then avoid atomic operations and free workspaces.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    torch.use_deterministic_algorithms(True)


def threads_per_process(config: Config, launch: LaunchInfo) -> int:
    """CPU threads for this process: as configured, else the node's cores shared equally."""
    if config.trainer.num_threads is not None:
        return config.trainer.num_threads
    return max(1, len(os.sched_getaffinity(0)) // launch.local_world_size)
