"""RMSNorm for the local layer spec."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(nn.Module):
    """Root-mean-square norm; unlike megatron-core's torch norm it takes part in sequence parallelism.

    Under sequence parallelism each tensor-parallel rank normalises its own part of the sequence, so the
    weight's gradient is a partial sum; the mark on the weight makes megatron-core add the parts up.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last dimension of ``[..., hidden_size]``; the statistics are taken in float32."""
        return rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


class RecomputedRMSNorm(RMSNorm):
    """For CPUs, where torch composes the norm of several steps and keeps their results for backward.

    They are a tenth of a layer's activations; computing them again costs next to nothing.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As the base class says."""
        result: Tensor = checkpoint(super().forward, hidden_states, use_reentrant=False, preserve_rng_state=False)
        return result
