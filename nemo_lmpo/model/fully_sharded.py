"""Fully sharded data parallelism: every rank keeps a part of each weight, and gathers a layer while it runs.

The work is torch's `fully_shard` (FSDP2), which megatron-core wraps as `TorchFullyShardedDataParallel`. This wrapper
takes that class's place, whose constructor leaves no choice where this project needs one: it reduces and adds up
gradients in the weights' BF16, averages them over the ranks, and wants GPUs. Here weights are float32 where they are
kept and BF16 where they are gathered, so that no main copy of them is needed, and gradients are float32 from their
reduction on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig, TorchFullyShardedDataParallel
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from nemo_lmpo.parallel.shards import is_shared, mark_shared

if TYPE_CHECKING:
    from nemo_lmpo.model.packed_gpt import PackedGPTModel


class ShardedDataParallel(TorchFullyShardedDataParallel):
    """A model chunk whose weights, gradients and optimizer state lie in equal parts on the ranks of a group.

    A layer is gathered before it runs, forward and backward, and its gradient is summed into the ranks' parts after
    each micro-batch. Output matrix and final norm (and the embedding where it is the same matrix) are gathered once a
    micro-batch, from its forward to the end of its backward, because the head reads them outside of any forward. All
    ranks have to run equally many micro-batches.

    Communicates over ``group``: an all-gather per layer forward and backward, a reduce-scatter backward.
    """

    def __init__(self, chunk: PackedGPTModel, group: dist.ProcessGroup, device: torch.device) -> None:
        """Keep this rank's part of the chunk's weights on ``device``.

        Args:
            chunk: may be on another device; a layer at a time is whole on ``device``.
            group: the ranks that would all hold the same weights.
            device: where the parts are to be.
        """
        _BaseDataParallel.__init__(self, config=chunk.config, module=chunk)
        self.ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        self.process_group = group
        self.device_mesh = mesh_of(group, device.type)
        marks = {name: dict(vars(parameter)) for name, parameter in chunk.named_parameters()}
        previous: FSDPModule | None = None
        for unit in _units(chunk):
            sharded = self._shard(unit, stays_gathered=unit is chunk)
            if self.config.recompute_granularity is not None and unit is not chunk:
                # A layer that runs again in backward would upset the order that torch takes down in forward.
                sharded.set_modules_to_backward_prefetch([previous] if previous is not None else [])
                previous = sharded
        for name, parameter in chunk.named_parameters():
            vars(parameter).update(marks[name])
            mark_shared(parameter, self.config.params_dtype)

    def _shard(self, unit: nn.Module, *, stays_gathered: bool) -> FSDPModule:
        compute = cast(torch.dtype, self.config.params_dtype)
        for parameter in unit.parameters():
            if parameter.requires_grad and not is_shared(parameter):
                parameter.data = parameter.data.float()  # its own main parameter
        policy = MixedPrecisionPolicy(
            param_dtype=compute if compute != torch.float32 else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        sharded: FSDPModule = fully_shard(
            unit, mesh=self.device_mesh, reshard_after_forward=not stays_gathered, mp_policy=policy
        )
        # Losses are shares of the global mean: gradients are added up over ranks, not averaged.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        return sharded

    def finish_grad_sync(self, force_all_reduce: bool = False) -> None:
        """Nothing is left to do: backward has summed the gradients. megatron-core 0.16's lacks the argument."""


def mesh_of(group: dist.ProcessGroup, device_type: str) -> DeviceMesh:
    """The group in the form that torch's FSDP takes."""
    return DeviceMesh.from_group(group, device_type)


def _units(chunk: PackedGPTModel) -> Iterator[nn.Module]:
    """What is gathered together, the chunk with what is left of it last."""
    if chunk.pre_process and not chunk.share_embeddings_and_output_weights:
        yield chunk.embedding
    yield from chunk.decoder.layers
    yield chunk


def release_gathered(chunks: list[Any]) -> None:
    """Free what forward alone left gathered of sharded chunks; the next one gathers the weights of then."""
    for chunk in chunks:
        if isinstance(chunk, ShardedDataParallel):
            cast(FSDPModule, chunk.module).reshard()
