"""Parts of parameters as boxes of them, which is what a checkpoint can hold without a copy.

Data-parallel ranks cut parameters, or an optimizer's state of them, as flat lists; megatron-core's sharded tensors are
boxes. A flat range of a matrix is at most three: part of a row, whole rows, part of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes along each axis."""


def boxed(entry: Any, start: int, tensor: Tensor, *, prefix: str = "") -> list[Any]:
    """A part of a parameter, or of what belongs to it, as sharded tensors that only this rank has.

    Args:
        entry: how megatron-core stores the parameter; SwiGLU's first matrix as two tensors, gate and up.
        start: where the part begins in the flattened parameter.
        tensor: the part, contiguous; its memory is what is written, or read into.
        prefix: of the names in the checkpoint.
    """
    return [_sharded(part, box, piece, prefix) for part, box, piece in _boxes(entry, start, tensor)]


def copy_from_boxes(target: Tensor, boxes: Sequence[Tensor]) -> None:
    """Put loaded boxes into the contiguous tensor that they are of; those that were read in place stand there."""
    place, flat = 0, target.view(-1)
    for box in boxes:
        piece = flat[place : place + box.numel()]
        if piece.data_ptr() != box.data_ptr():
            piece.copy_(box.reshape(-1))
        place += box.numel()


def _boxes(entry: Any, start: int, shard: Tensor) -> Iterator[tuple[Any, Box, Tensor]]:
    """The boxes of a part: the sharded tensor that each lies in, its place there, and its elements of ``shard``."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    parts = list(nested_values({0: entry.build()})) if isinstance(entry, ShardedTensorFactory) else [entry]
    stop, flat = start + shard.numel(), shard.view(-1)
    for part in sorted(parts, key=lambda part: part.data.storage_offset()):
        assert part.data.is_contiguous(), part.key
        begin = part.data.storage_offset() - entry.data.storage_offset()
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


def _sharded(part: Any, box: Box, tensor: Tensor, prefix: str) -> Any:
    """A box as a sharded tensor; only this rank of the data-parallel group has it."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    leading = part.prepend_axis_num
    offsets, sizes = box
    inner_offset = (place + offset for place, offset in zip(part.global_offset[leading:], offsets, strict=True))
    size = (*[1] * leading, *sizes)
    return ShardedTensor(
        key=f"{prefix}{part.key}",
        data=tensor.view(size),
        dtype=tensor.dtype,
        local_shape=size,
        global_shape=part.global_shape,
        global_offset=(*part.global_offset[:leading], *inner_offset),
        axis_fragmentations=None,
        replica_id=(*part.replica_id[:2], 0),
        allow_shape_mismatch=part.allow_shape_mismatch,
    )
