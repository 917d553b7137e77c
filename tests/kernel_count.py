"""Counts the kernels that a GPU would launch, on fake tensors: every operation but views and allocations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What moves no data.
VIEWS = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh", "narrow",
    "new_empty", "new_empty_strided", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unflatten", "unsqueeze", "view", "_unsafe_view", "_reshape_alias", "chunk",
}  # fmt: skip
# What launches more than one: flash's backward a dot product with the output, the gradients, a conversion of the
# queries' and, with grouped queries, two sums over the group; torch's public function also clears a random state.
SEVERAL = {
    "_flash_attention_forward": 1,
    "_flash_attention_backward": 5,
    "_varlen_attn": 2,
    "_varlen_attn_backward": 5,
    "_scaled_dot_product_flash_attention": 1,
    "_scaled_dot_product_flash_attention_backward": 5,
    "slice_backward": 2,  # a full-size tensor of zeros, then a copy into it
    "select_backward": 2,
}


class KernelCount(TorchDispatchMode):
    """The kernels launched inside a ``with`` block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[-1].split(".")[0]
        if name not in VIEWS and not func.name().startswith("prim::"):
            self.by_name[name] += SEVERAL.get(name, 1)
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.by_name.values())


def of_attention(module: torch.nn.Module, plan: Any, tokens: int, heads: int, groups: int) -> Counter[str]:
    """Kernels of one attention layer on ``tokens`` bfloat16 tokens, forward and backward, by name."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        states = [
            torch.empty(tokens, 1, count, 128, dtype=torch.bfloat16, requires_grad=True)
            for count in (heads, groups, groups)
        ]
        with KernelCount() as count:
            attended = module(*states, attention_bias=plan)
            attended.backward(torch.empty_like(attended))
    return count.by_name  # type: ignore[no-any-return]
