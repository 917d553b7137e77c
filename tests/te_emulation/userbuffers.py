"""Userbuffers of `transformer_engine_torch` on gloo: what a GPU communicates inside of products, before or after them.

What the compiled module checks of sizes is checked here, too: all that goes through a buffer fills it.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CommOverlapType: Any = enum.Enum("CommOverlapType", ["RS", "AG"])
ASKED: list[tuple[list[int], torch.dtype, int]] = []
"""Shape, dtype and ranks of each buffer that was made in this process."""


class CommOverlapHelper:
    """Which ranks share buffers: those of the second group, if there is one."""

    def __init__(self, world: dist.ProcessGroup, domain: dist.ProcessGroup | None = None) -> None:
        self.group = domain or world


class CommOverlap:
    """A buffer of a whole row, of which each rank fills a part."""

    def __init__(
        self, shape: list[int], dtype: torch.dtype, helper: CommOverlapHelper, ranks: int, *_: Any, **__: Any
    ) -> None:
        assert helper.group.size() == ranks
        assert shape[0] % ranks == 0
        ASKED.append((shape, dtype, ranks))
        self.group = helper.group
        self.buffer = torch.zeros(shape, dtype=dtype)

    def is_fp8_ubuf(self) -> bool:
        return self.buffer.element_size() == 1

    def with_cublasmp(self) -> bool:
        return False

    def _own(self) -> Tensor:
        return self.buffer.chunk(self.group.size())[self.group.rank()]

    def copy_into_buffer(self, tensor: Tensor, local_chunk: bool = False) -> None:
        place = self._own() if local_chunk else self.buffer
        assert tensor.numel() == place.numel(), f"{tuple(tensor.shape)} does not fill {tuple(place.shape)}"
        assert tensor.element_size() == place.element_size()
        place.copy_(tensor.reshape(place.shape))

    def get_buffer(self, local_chunk: bool = False, shape: list[int] | None = None) -> Tensor:
        place = self._own() if local_chunk else self.buffer
        return place if shape is None else place.view(shape)

    def gather(self) -> None:
        """Let every rank have all parts."""
        dist.all_gather_into_tensor(self.buffer, self._own().clone(), group=self.group)

    def scatter(self, parts: Tensor, out: Tensor | None) -> None:
        """This rank's part of the sum of all ranks' ``parts``: to ``out``, or to its part of the buffer."""
        total = parts.float()
        dist.all_reduce(total, group=self.group)
        own = total.chunk(self.group.size())[self.group.rank()]
        place = self._own() if out is None else out
        assert place.numel() == own.numel()
        place.copy_(own.reshape(place.shape))


class CommOverlapP2P(CommOverlap):
    """The same, for what is sent around a ring."""


def before_product(overlap: CommOverlap | None, kind: Any) -> None:
    """Gather what the product, or the one behind it, reads in the buffer."""
    if overlap is not None and kind is CommOverlapType.AG:
        overlap.gather()


def after_product(overlap: CommOverlap | None, kind: Any, product: Tensor, *, bulk: bool, out: Tensor | None) -> None:
    """Scatter the product; or, in bulk, what an earlier one left in the buffer."""
    if overlap is not None and kind is CommOverlapType.RS:
        overlap.scatter(overlap.buffer if bulk else product, out)


def device_supports_multicast(*_: object) -> bool:
    """As on H100 with NVLink."""
    return True


def ubuf_built_with_mpi() -> bool:
    """As in NVIDIA's wheels."""
    return False


def get_stream_priority_range(*_: object) -> tuple[int, int]:
    """The lowest and the highest."""
    return 0, -5
