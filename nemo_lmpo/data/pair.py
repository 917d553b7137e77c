"""Values that pass between data, model and training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairTokens:
    """One tokenized preference pair; the prompt ends where both responses begin."""

    pair_id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    reference_chosen_logp: float | None = None
    """Sum of response log-probabilities under the reference model, if one is used."""
    reference_rejected_logp: float | None = None
    reference_shared_logps: tuple[float, float] | None = None
    """The same over the common length of both responses, chosen and rejected, if the loss wants it."""


@dataclass
class PackedSequence:
    """One micro-batch: whole pairs laid behind each other in a row of ``T`` tokens.

    ``segments`` is the attention layout and stays on the CPU (it steers Python loops); everything else moves
    to the device. A segment attends to its prefix (another segment of the row) and causally to itself, never
    to anything else.
    """

    input_ids: Tensor
    """``[1, T]`` int64."""
    position_ids: Tensor
    """``[1, T]`` int64; both responses continue the positions of their prompt."""
    segments: Tensor
    """``[S, 4]`` int32 on the CPU: start, length, prefix start, prefix length (0 without prefix)."""
    predict_positions: Tensor
    """``[P]`` int64: where in the row the hidden state stands that predicts a response token."""
    target_ids: Tensor
    """``[P]`` int64: that response token."""
    sequence_index: Tensor
    """``[P]`` int64: the sequence it belongs to, ``2 * pair`` for chosen and ``2 * pair + 1`` for rejected."""
    pair_index: Tensor
    """``[B]`` int64: each pair's place in the global batch."""
    response_lengths: Tensor
    """``[B, 2]`` float32: response tokens of chosen and rejected."""
    reference_logps: Tensor | None = None
    """``[B, 2]`` float32: reference sums of chosen and rejected; ``[B, 4]`` with those over the common length."""

    @property
    def num_pairs(self) -> int:
        """Pairs in the row, ``B``."""
        return self.pair_index.numel()

    @property
    def num_tokens(self) -> int:
        """Tokens in the row including padding, ``T``."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> PackedSequence:
        """The row with everything but ``segments`` on ``device``."""
        moved = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) and name != "segments" else value
            for name, value in vars(self).items()
        }
        return PackedSequence(**moved)
