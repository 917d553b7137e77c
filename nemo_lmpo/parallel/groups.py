"""Process groups: who this process is, and the groups that the rest of the code communicates over.

The only reader of megatron-core's global parallel state; everything else takes groups as arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from nemo_lmpo.config.schema import ModelConfig
from nemo_lmpo.runtime.launch import LaunchInfo


def start_process_group(launch: LaunchInfo, *, use_cuda: bool, timeout_minutes: float = 30.0) -> None:
    """Join the job's process group: NCCL on GPUs, gloo on CPUs; a single process needs no network.

    The group is not bound to the device (`device_id`): docs/decisions/0005-process-groups.md.
    """
    options: dict[str, object] = {"timeout": timedelta(minutes=timeout_minutes)}
    if use_cuda:
        torch.cuda.set_device(launch.local_rank % torch.cuda.device_count())
    backend = "nccl" if use_cuda else "gloo"
    if launch.world_size == 1:
        options["store"] = dist.HashStore()
    elif launch.store_path is not None:
        options["store"] = dist.FileStore(launch.store_path, launch.world_size)
    dist.init_process_group(backend, rank=launch.rank, world_size=launch.world_size, **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ParallelGroups:
    """The groups of this process; sizes and ranks follow from them."""

    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    context: dist.ProcessGroup
    data: dist.ProcessGroup
    """Replicas that see different pairs."""
    data_context: dist.ProcessGroup
    """All ranks that hold the same weights, experts' left out: data- and context-parallel together."""
    expert: dist.ProcessGroup
    """Ranks that each hold other experts of a layer; ranks of the tensor, context and data groups."""
    expert_tensor: dist.ProcessGroup
    """Ranks that hold parts of the same experts."""
    expert_data: dist.ProcessGroup
    """Ranks that hold the same parts of the same experts."""

    @property
    def is_last_stage(self) -> bool:
        """Whether this process computes the loss."""
        return self.pipeline.rank() == self.pipeline.size() - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of this pipeline's last stage."""
        return dist.get_process_group_ranks(self.pipeline)[-1]


def create_groups(model: ModelConfig, *, timeout_minutes: float = 30.0) -> ParallelGroups:
    """Lay the job's processes out as tensor, context, data and pipeline groups (megatron-core's order).

    Communicates: creating groups is collective over the whole job.

    Args:
        model: says how many of each.
        timeout_minutes: how long a collective of these groups waits; each group has a limit of its own, which does not
            follow from that of the whole job.
    """
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=model.tensor_model_parallel_size,
            pipeline_model_parallel_size=model.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=model.virtual_pipeline_model_parallel_size,
            context_parallel_size=model.context_parallel_size,
            expert_model_parallel_size=model.expert_model_parallel_size,
            expert_tensor_parallel_size=model.expert_tensor_parallel_size,
            distributed_timeout_minutes=timeout_minutes,
            # Nothing here communicates in main memory, and gloo wants an address of each host that others reach.
            create_gloo_process_groups=False,
        )
    return ParallelGroups(
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        data_context=parallel_state.get_data_parallel_group(with_context_parallel=True),
        expert=parallel_state.get_expert_model_parallel_group(),
        expert_tensor=parallel_state.get_expert_tensor_parallel_group(),
        expert_data=parallel_state.get_expert_data_parallel_group(),
    )


def wait_for_all(device: torch.device) -> None:
    """Wait until every rank is here. Communicates: a barrier over all ranks, on this rank's device.

    NCCL would otherwise guess a device from the rank's number where a group has not communicated yet.
    """
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)


def destroy_groups() -> None:
    """Leave all groups; safe to call when there are none."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
