"""Core attention in one call of torch's own variable-length flash kernel (GPUs from the A100 on, 16 bit)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from nemo_lmpo.model.attention import PackedAttention
from nemo_lmpo.model.attention_plan import AttentionPlan

LARGEST_HEAD_DIM = 256
HEAD_DIM_MULTIPLE = 8

Kernel = Callable[[Tensor, Tensor, Tensor, AttentionPlan, "float | None", "tuple[int, int]"], Tensor]


class PackedFlashAttention(PackedAttention):
    """All spans in one kernel. Backward is deterministic under `torch.use_deterministic_algorithms`."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        """As the base class says."""
        return flash_kernel()(query, key, value, plan, self.softmax_scale, self.window)


@cache
def flash_kernel() -> Kernel:
    """The public function where torch's version knows grouped queries and windows, else the operator below it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return operator_kernel
    known = inspect.signature(varlen_attn).parameters
    return public_kernel if {"enable_gqa", "window_size"} <= known.keys() else operator_kernel


def public_kernel(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float | None, window: tuple[int, int]
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn` of torch 2.12 and newer."""
    from torch.nn.attention.varlen import varlen_attn

    attended = varlen_attn(
        query,
        key,
        value,
        plan.query_offsets,
        plan.key_offsets,
        plan.longest_query,
        plan.longest_key,
        scale=scale,
        window_size=window,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(attended, Tensor)
    return attended


def operator_kernel(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float | None, window: tuple[int, int]
) -> Tensor:
    """The operator that `varlen_attn` calls, with its own derivative, of older torch."""
    attended: Tensor = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        plan.query_offsets,
        plan.key_offsets,
        plan.longest_query,
        plan.longest_key,
        0.0,
        window == (-1, 0),
        False,
        scale=scale,
        window_size_left=window[0],
        window_size_right=window[1],
    )[0]
    return attended
