"""Operations on all gradients at once, for megatron-core where neither Transformer Engine nor apex brings them.

Its own fallbacks take one tensor after the other, and its norm reads every tensor's result back from the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def l2_norm(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], *_: Any) -> tuple[Tensor, None]:
    """The norm of all tensors together, ``[1]`` float32 on their device; nothing is read back."""
    norms = torch._foreach_norm(tensor_lists[0], 2.0, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms)).reshape(1), None


def scale(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], factor: float) -> None:
    """Write the first list's tensors times ``factor`` into the second list's."""
    sources, targets = tensor_lists
    if all(source is target for source, target in zip(sources, targets, strict=True)):
        torch._foreach_mul_(targets, factor)
        return
    torch._foreach_copy_(targets, sources if factor == 1.0 else torch._foreach_mul(sources, factor))


def replace_fallbacks() -> None:
    """Put these in the places of megatron-core's fallbacks, where it took them; harmless when called again."""
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale

    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm
    for module in (clip_grads, optimizer):
        if module.multi_tensor_scale_impl is local_multi_tensor_scale:
            module.multi_tensor_scale_impl = scale
