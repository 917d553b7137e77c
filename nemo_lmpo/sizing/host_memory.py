"""Host memory of a node: for an optimizer that is there, and while a checkpoint is written from GPUs.

What comes from a GPU goes through pinned blocks of the host's memory. PyTorch rounds each up to a power of two and
keeps it for the next copy of that size.
"""

from __future__ import annotations

from collections.abc import Iterator

from nemo_lmpo.config.rules import ParallelLayout
from nemo_lmpo.formats.lora_targets import MLP, projections_of
from nemo_lmpo.sizing.flops import shape_of
from nemo_lmpo.sizing.memory import (
    estimate_memory,
    experts_cut,
    number_bytes,
    trained_experts_part,
    vocabulary_rows,
)

WRITERS = 2
"""Files that a rank writes at the same time."""


def background_bytes(layout: ParallelLayout) -> float:
    """Pinned blocks of the busiest node for saves in the background: all that its ranks write, at the same time.

    One rank of each replica group writes weights, and the optimizer's state if that is not sharded; each rank writes
    its own shard otherwise, and with `model.fsdp` of weights, too.
    """
    config = layout.config
    memory, devices, size = estimate_memory(layout), config.trainer.devices, number_bytes(config)
    # What is trained has float32 gradients; with adapters these alone are written.
    weights = memory.gradients / 4 * size * _rounding(layout, size)
    states = memory.optimizer * _rounding(layout, 4)
    if config.model.fsdp:
        main = memory.gradients * _rounding(layout, 4) if size == 2 else 0.0
        return devices * (weights + main + states)
    # Ranks count through tensor parallelism first, then the replicas of one stage; so do those that hold experts.
    tensor, cut = config.model.tensor_model_parallel_size, experts_cut(config.model)
    part = trained_experts_part(layout.architecture, config)
    writes = [
        (1 - part) * (rank // tensor % layout.replicas == 0) + part * (rank // cut % layout.expert_replicas == 0)
        for rank in range(layout.world_size)
    ]
    first = max(sum(writes[start : start + devices]) for start in range(0, len(writes), devices))
    if config.optim.use_distributed_optimizer:
        return first * weights + devices * states
    return first * (weights + states)


def offloaded_bytes(layout: ParallelLayout) -> float:
    """Of an optimizer on the host (`optim.cpu_offload`), of a whole node.

    For each parameter a float32 main parameter, two float32 moments, and its gradient, pinned, in float32. Ranks share
    them as they would on GPUs.
    """
    config = layout.config
    if not config.optim.cpu_offload:
        return 0.0
    parameters = estimate_memory(layout).gradients / 4 / max(layout.replicas, 1)
    return config.trainer.devices * parameters * (4 + 2 * 4 + 4 * _rounding(layout, 4))


def foreground_bytes(layout: ParallelLayout) -> float:
    """The same for saves that training waits for: a block of each size that occurs, a writer."""
    sizes = {number_bytes(layout.config), 4}
    blocks = {block_bytes(count * size) for count, _ in _tensors(layout) for size in sizes}
    return layout.config.trainer.devices * WRITERS * sum(blocks)


def block_bytes(size: float) -> int:
    """The pinned block that PyTorch takes for so many bytes: the next power of two."""
    return 1 << max(0, int(size - 1).bit_length())


def _rounding(layout: ParallelLayout, size: int) -> float:
    """Bytes of the blocks over those of the tensors, for numbers of ``size`` bytes."""
    tensors = list(_tensors(layout))
    needed = sum(count * size * times for count, times in tensors)
    return sum(block_bytes(count * size) * times for count, times in tensors) / needed


def _tensors(layout: ParallelLayout) -> Iterator[tuple[int, int]]:
    """Numbers of each tensor that a rank writes, and how many there are.

    Ranks that share the optimizer's state alone cut its tensors in few places, and are counted as if in none.
    """
    config, shape = layout.config, shape_of(layout.architecture)
    model, shards = config.model, max(layout.replicas, 1) if config.model.fsdp else 1
    tensor, layers = model.tensor_model_parallel_size, layout.architecture.num_layers
    stage = -(-layers // model.pipeline_model_parallel_size)
    if model.peft.name is not None:
        targets = projections_of(model.peft.target_modules)
        on_experts = [name for name in targets if shape.experts and name in MLP]
        # Adapters of a dense model are sized by its MLP, the widest; of attention in a mixture, by its queries.
        wide = shape.query if shape.experts else shape.ffn
        for count in (shape.hidden, wide // tensor) if len(targets) > len(on_experts) else ():
            yield -(-count * model.peft.rank // shards), stage * (len(targets) - len(on_experts))
        local = shape.experts // model.expert_model_parallel_size
        for count in (shape.hidden, shape.ffn // model.expert_tensor_parallel_size) if on_experts else ():
            yield count * model.peft.rank * local, stage * len(on_experts)
        return
    mlp = [shape.ffn] * (3 if shape.gated else 2)
    for columns in (shape.query + shape.key_value, shape.query, *([] if shape.experts else mlp)):
        yield -(-columns * shape.hidden // (tensor * shards)), stage
    if shape.experts:
        yield shape.experts * shape.hidden, stage
        local = len(mlp) * shape.experts // model.expert_model_parallel_size
        yield shape.ffn * shape.hidden // model.expert_tensor_parallel_size, stage * local
    yield -(-shape.hidden // shards), 2 * stage
    ends = 1 if shape.tied or model.pipeline_model_parallel_size > 1 else 2
    yield -(-int(vocabulary_rows(model, layout.architecture)) * shape.hidden // shards), ends
