"""Optimizer state in a form that every layout reads, with or without the distributed optimizer.

megatron-core's optimizer classes each have a format of their own. Here a parameter's moments (and its float32
main copy, if the model is in bfloat16) are stored like the parameter itself, under
``optimizer.state.{exp_avg,exp_avg_sq,fp32_param}.<parameter>``, and nothing else but the step count is kept:
learning rates follow from the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes along each axis."""


def inner_optimizers(optimizer: Any) -> list[Any]:
    """megatron-core chains one optimizer a kind of parameter; dense models have one."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def optimizer_sharded_state(optimizer: Any, model_state: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """The optimizer's tensors as a sharded state dict.

    Args:
        optimizer: megatron-core optimizer.
        model_state: the model chunks' sharded state dict, made with ``keep_vars=True`` semantics (its tensors
            are the parameters themselves).
        is_loading: whether tensors are to be filled, so that missing state must be made first.

    Nothing is communicated, and nothing copied: the tensors are the optimizer's own or views of them.
    """
    state: dict[str, Any] = {}
    for index, inner in enumerate(inner_optimizers(optimizer)):
        if getattr(inner, "is_stub_optimizer", False):
            continue
        if is_loading:
            _make_state(inner)
        if _is_distributed(inner):
            state[f"{index}"] = _distributed_state(inner, model_state)
        else:
            state[f"{index}"] = _plain_state(inner, model_state)
    return state


def load_optimizer_state(optimizer: Any, loaded: dict[str, Any], *, step: int) -> None:
    """Put tensors that were read back into the optimizer, and set its step count."""
    for index, inner in enumerate(inner_optimizers(optimizer)):
        if getattr(inner, "is_stub_optimizer", False):
            continue
        tensors = loaded[f"{index}"]
        if _is_distributed(inner):
            _load_distributed(inner, tensors)
        else:
            for number, (_, main, state) in enumerate(_plain_parameters(inner)):
                for name in MOMENTS:
                    state[name].copy_(tensors[number][name])
                if "fp32_param" in tensors[number]:
                    main.data.copy_(tensors[number]["fp32_param"])
        _set_step(inner, step)


def _is_distributed(inner: Any) -> bool:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return isinstance(inner, DistributedOptimizer)


def _make_state(inner: Any) -> None:
    """Allocate moments that the first step would allocate."""
    inner.init_state_fn(inner.optimizer, inner.config)


def _set_step(inner: Any, step: int) -> None:
    """Torch keeps the count with each parameter, the fused optimizers with each group."""
    for group in inner.optimizer.param_groups:
        if "step" in group or not isinstance(inner.optimizer, torch.optim.AdamW):
            group["step"] = step
        for parameter in group["params"]:
            if isinstance(inner.optimizer, torch.optim.AdamW) and parameter in inner.optimizer.state:
                inner.optimizer.state[parameter]["step"] = torch.tensor(float(step))


def _plain_parameters(inner: Any) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Model parameter, main parameter (the same one in float32) and state, of a non-distributed optimizer."""
    model_of_main: dict[int, Tensor] = {}
    for model_group, main_group in zip(
        getattr(inner, "float16_groups", []), getattr(inner, "fp32_from_float16_groups", []), strict=True
    ):
        model_of_main.update((id(main), model) for model, main in zip(model_group, main_group, strict=True))
    for group in inner.optimizer.param_groups:
        for main in group["params"]:
            yield model_of_main.get(id(main), main), main, inner.optimizer.state[main]


def _sharded_parameters(model_state: dict[str, Any]) -> dict[int, Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    sharded, _ = extract_sharded_tensors_and_factories(model_state)
    return {id(entry.data): entry for entry in nested_values(sharded)}


def _plain_state(inner: Any, model_state: dict[str, Any]) -> dict[int, dict[str, Any]]:
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    by_identity = _sharded_parameters(model_state)
    result: dict[int, dict[str, Any]] = {}
    for number, (model, main, state) in enumerate(_plain_parameters(inner)):
        tensors = {name: state[name] for name in MOMENTS}
        if main is not model:
            tensors["fp32_param"] = main
        result[number] = {
            name: make_sharded_optimizer_tensor(by_identity[id(model)], tensor, prefix=f"optimizer.state.{name}")
            for name, tensor in tensors.items()
        }
    return result


def _distributed_state(inner: Any, model_state: dict[str, Any]) -> dict[int, dict[str, list[Any]]]:
    """This rank's shard of each parameter's state, in the format of a plain optimizer, without a copy.

    The optimizer cuts parameters as flat lists, a checkpoint holds boxes of tensors; a flat range of a matrix is at
    most three boxes: part of a row, whole rows, part of a row. No state is gathered anywhere.
    """
    by_identity = _sharded_parameters(model_state)
    return {
        number: {
            name: [
                _boxed(part, box, tensor, f"optimizer.state.{name}")
                for part, box, tensor in _boxes(by_identity[id(model)], model, start, shard)
            ]
            for name, shard in tensors.items()
        }
        for number, (model, start, tensors) in enumerate(_shards(inner))
    }


def _shards(inner: Any) -> Iterator[tuple[Tensor, int, dict[str, Tensor]]]:
    """Parameters that this rank keeps state of: the model's, where its flat range starts, and the state's tensors."""
    for ranges in inner.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for model, places in bucket["param_map"].items():
                    state = inner._get_main_param_and_optimizer_states(model)
                    tensors = {name: state[name] for name in MOMENTS}
                    if inner.config.bf16:  # a float32 model's parameters are their own main copies
                        tensors["fp32_param"] = state["param"]
                    yield model, places["param"].start, tensors


def _boxes(entry: Any, model: Tensor, start: int, shard: Tensor) -> Iterator[tuple[Any, Box, Tensor]]:
    """The boxes of a shard: the sharded tensor that each lies in, its place there, and its elements of ``shard``.

    Args:
        entry: how the parameter is stored; SwiGLU's first matrix as two tensors, gate and up.
        model: the parameter.
        start: where the shard begins in the flattened parameter.
        shard: ``[n]``.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    parts = list(nested_values({0: entry.build()})) if isinstance(entry, ShardedTensorFactory) else [entry]
    stop, flat = start + shard.numel(), shard.view(-1)
    for part in sorted(parts, key=lambda part: part.data.storage_offset()):
        assert part.data.is_contiguous(), part.key
        begin = part.data.storage_offset() - model.storage_offset()
        first, last = max(start, begin), min(stop, begin + part.data.numel())
        for box in boxes_of_range(tuple(part.local_shape), first - begin, last - begin) if first < last else ():
            count = math.prod(box[1])
            yield part, box, flat[first - start : first - start + count].view(box[1])
            first += count


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The elements ``start`` to ``stop`` (not included) of a flattened tensor, as boxes of the tensor, in order."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    head = min(stop, -(-start // row) * row)
    body = max(head, stop // row * row)
    for begin, end in ((start, head), (body, stop)):
        if begin == body and head < body:
            yield (head // row, *[0] * (len(shape) - 1)), ((body - head) // row, *shape[1:])
        index = begin // row
        for offsets, sizes in boxes_of_range(shape[1:], begin - index * row, end - index * row):
            yield (index, *offsets), (1, *sizes)


def _boxed(part: Any, box: Box, tensor: Tensor, prefix: str) -> Any:
    """A box of a parameter's state as a sharded tensor; only this rank of the data-parallel group has it."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    leading = part.prepend_axis_num
    offsets, sizes = box
    inner_offset = (place + offset for place, offset in zip(part.global_offset[leading:], offsets, strict=True))
    size = (*[1] * leading, *sizes)
    return ShardedTensor(
        key=f"{prefix}.{part.key}",
        data=tensor.view(size),
        dtype=tensor.dtype,
        local_shape=size,
        global_shape=part.global_shape,
        global_offset=(*part.global_offset[:leading], *inner_offset),
        axis_fragmentations=None,
        replica_id=(*part.replica_id[:2], 0),
        allow_shape_mismatch=part.allow_shape_mismatch,
    )


def _load_distributed(inner: Any, loaded: dict[int, dict[str, list[Tensor]]]) -> None:
    """Boxes are read in place; one that was not is copied."""
    for number, (_, _, tensors) in enumerate(_shards(inner)):
        for name, shard in tensors.items():
            place, flat = 0, shard.view(-1)
            for box in loaded[number][name]:
                target = flat[place : place + box.numel()]
                if target.data_ptr() != box.data_ptr():
                    target.copy_(box.reshape(-1))
                place += box.numel()
