"""Rotary embedding by explicit position ids, with Llama-3.1 frequency scaling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nemo_lmpo.formats.architecture import Architecture, architecture_to_hf


def inverse_frequencies(architecture: Architecture) -> Tensor:
    """Rotation per position of each channel pair, ``[head_dim / 2]`` float32, in radians; scaled by transformers."""
    if architecture.rope_scaling is None:
        channels = torch.arange(0, architecture.head_dim, 2, dtype=torch.int64).float() / architecture.head_dim
        return 1.0 / (architecture.rope_theta**channels)
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = architecture_to_hf(architecture)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    frequencies: Tensor = ROPE_INIT_FUNCTIONS[architecture.rope_scaling.kind](config, device=torch.device("cpu"))[0]
    return frequencies


class PositionedRotaryEmbedding(nn.Module):
    """Takes the place of megatron-core's rotary table, which assumes that position equals index in the row.

    In a packed row it does not: positions start anew with every pair and both responses continue those of
    their prompt. The caller sets :attr:`position_ids` right before the model's forward.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        # A buffer moves to the device with the model; one that is not persistent is in no checkpoint.
        self.inverse_frequencies: Tensor
        self.register_buffer("inverse_frequencies", inverse_frequencies(architecture), persistent=False)
        self.position_ids: Tensor | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> PositionedRotaryEmbedding:
        """Move to another device, but never to another dtype: angles of far positions need float32."""
        self.inverse_frequencies = self.inverse_frequencies.to(fn(self.inverse_frequencies[:0]).device)
        return self

    def get_rotary_seq_len(self, *args: object, **kwargs: object) -> int:
        """Part of megatron-core's interface; the length follows from the positions."""
        return 0

    def forward(self, max_seq_len: int, **_: object) -> Tensor:
        """Angles ``[T, 1, 1, head_dim]`` float32 of the row's ``T`` positions."""
        assert self.position_ids is not None, "position_ids are set by the model's forward"
        positions = self.position_ids.reshape(-1).float()
        angles = torch.outer(positions, self.inverse_frequencies)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
