"""What adapters on linear layers and adapters on experts are made of."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def typed_modules(modules: dict[str, ModuleT]) -> Mapping[str, ModuleT]:
    """The same as submodules; torch's own type does not tell of what class they are."""
    return cast(Mapping[str, ModuleT], nn.ModuleDict(modules))


class LowRank(nn.Module):
    """A and B of one projection, this rank's part; both start at zero.

    Args:
        rank: of the product.
        columns: this rank's inputs.
        rows: this rank's outputs.
        like: gives dtype and device.
        stacked: sizes of axes in front, for several of them.
    """

    def __init__(self, rank: int, columns: int, rows: int, *, like: Tensor, stacked: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(*stacked, rank, columns, dtype=like.dtype, device=like.device))
        self.lora_B = nn.Parameter(torch.zeros(*stacked, rows, rank, dtype=like.dtype, device=like.device))


def drawn(name: str, like: Tensor, part: int, parts: int) -> Tensor:
    """The start of an A, uniform as PEFT's is: this rank's columns, ``[rank, columns]`` on the CPU in float32.

    Args:
        name: which A it is, and the seed: each has a generator of its own, so that it does not depend on the layout.
        like: gives the shape.
        part: which of ``parts`` of the columns are this rank's.
        parts: over how many ranks the columns lie.
    """
    rank, columns = like.shape
    whole = columns * parts
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    # Kaiming's uniform bound with PEFT's slope of sqrt(5).
    start = (torch.rand(rank, whole, generator=generator) * 2 - 1) / math.sqrt(whole)
    return start[:, part * columns : (part + 1) * columns]
