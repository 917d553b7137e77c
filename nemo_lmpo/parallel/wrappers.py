"""What megatron-core wraps around a model: data parallelism and 16-bit weights."""

from __future__ import annotations

from torch import nn


def unwrap(module: nn.Module) -> nn.Module:
    """The model inside distributed and precision wrappers."""
    while isinstance(inner := getattr(module, "module", None), nn.Module):
        module = inner
    return module
