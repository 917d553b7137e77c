"""FP8 training by its definition, without Transformer Engine: what the layers' products are to be.

Apart from `fp8.py`, which has the form of the compiled module's calls. Here a linear layer is three lines: both
operands are rounded to FP8, multiplied in float32, and the result is rounded to the run's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = (torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)
"""Formats, and their largest numbers."""
GRADIENTS = {"hybrid": E5M2, "tensorwise": E4M3, "blockwise": E4M3}
"""`model.fp8`, and the format of the outputs' gradients; everything else is E4M3."""
LENGTHS = {"hybrid": 16, "tensorwise": 16, "blockwise": 128}
"""What rows divide by in one process."""


def rounded(matrix: Tensor, form: tuple[torch.dtype, float], block: tuple[int, int] | None) -> Tensor:
    """To FP8 and back, with a scale per tensor, or a power of two per block of so many rows and columns."""
    dtype, largest = form
    height, width = block or matrix.shape
    whole = F.pad(matrix.float(), (0, -matrix.shape[1] % width, 0, -matrix.shape[0] % height))
    tiles = whole.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    scale = largest / tiles.abs().amax(dim=(1, 3), keepdim=True)
    if block is not None:
        scale = 2.0 ** scale.log2().floor()
    scale = torch.where(scale.isinf(), 1.0, scale)
    result: Tensor = (tiles * scale).clamp(-largest, largest).to(dtype).float() / scale
    return result.flatten(2, 3).flatten(0, 1)[: matrix.shape[0], : matrix.shape[1]]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(states, weight)
        ctx.kind = kind
        rows, squares = ((1, 128), (128, 128)) if kind == "blockwise" else (None, None)
        product = rounded(states.flatten(0, -2), E4M3, rows) @ rounded(weight, E4M3, squares).t()
        return product.to(states.dtype).view(*states.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        states, weight = ctx.saved_tensors
        blocks = ((1, 128), (128, 1), (128, 128)) if ctx.kind == "blockwise" else (None, None, None)
        rows, columns, squares = blocks
        gradient, form = gradients[0].flatten(0, -2), GRADIENTS[ctx.kind]
        of_states = rounded(gradient, form, rows) @ rounded(weight, E4M3, squares)
        of_weight = rounded(gradient, form, columns).t() @ rounded(states.flatten(0, -2), E4M3, columns)
        return of_states.to(states.dtype).view(states.shape), of_weight.to(weight.dtype), None


def in_fp8(states: Tensor, weight: Tensor, kind: str) -> Tensor:
    """``states @ weight.t()`` as `model.fp8` = ``kind`` says, with its derivative."""
    product: Tensor = _Product.apply(states, weight, kind)  # type: ignore[no-untyped-call]  # torch's
    return product


@contextmanager
def products_in_fp8(kind: str) -> Iterator[None]:
    """Let megatron-core's own linear layers multiply so in this process, on rows as FP8 wants them."""
    from megatron.core.tensor_parallel import layers

    from nemo_lmpo.training import batches

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None, *_: object, **__: object) -> Tensor:
        product = in_fp8(input, weight, kind)
        return product if bias is None else product + bias

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "linear_with_grad_accumulation_and_async_allreduce", linear)
        patch.setattr(layers, "linear_with_frozen_weight", linear)
        patch.setattr(batches, "row_multiple", lambda model, *, gpu: LENGTHS[kind])
        yield
