"""Values that pass between data, model and training."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(kw_only=True)
class PackedRow:
    """Whole pairs laid behind each other: a row of ``T`` tokens, or the part of it that a context-parallel rank has."""

    input_ids: Tensor
    """``[1, T]`` int64; of a part ``[1, T / cp]``."""
    position_ids: Tensor
    """As ``input_ids``; both responses continue the positions of their prompt."""
    predict_positions: Tensor
    """``[P]`` int64: where in the row, or this part of it, the hidden state stands that predicts a response token; of a
    part, only of tokens that are predicted there."""
    target_ids: Tensor
    """``[P]`` int64: that response token."""
    sequence_index: Tensor
    """``[P]`` int64: the sequence it belongs to, ``2 * pair`` for chosen and ``2 * pair + 1`` for rejected."""
    pair_index: Tensor
    """``[B]`` int64: the place in the global batch of each pair of the whole row."""
    response_lengths: Tensor
    """``[B, 2]`` float32: response tokens of chosen and rejected."""
    reference_logps: Tensor | None = None
    """``[B, 2]`` float32: reference sums of chosen and rejected; ``[B, 4]`` with those over the common length."""

    @property
    def num_pairs(self) -> int:
        """Pairs in the row, ``B``."""
        return self.pair_index.numel()


@dataclass(kw_only=True)
class PackedSequence(PackedRow):
    """One micro-batch, whole, on the CPU.

    A segment attends to its prefix (another segment of the row) and causally to itself, never to anything else.
    """

    segments: Tensor
    """``[S, 4]`` int32: start, length, prefix start, prefix length (0 without prefix)."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the row including padding, ``T``."""
        return self.input_ids.numel()
