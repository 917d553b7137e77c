"""Values that pass between data, model and training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


PAIRS, CONVERSATIONS, ANSWERS = "pairs", "conversations", "answers"
"""What examples are: two responses that share a prompt, one to imitate, or one with a label."""


@dataclass(frozen=True)
class Response:
    """What follows a prompt, and which of its tokens are predicted.

    Of a preference pair all of an answer is predicted. A conversation has one response, which begins with the first
    token that is predicted and ends with the last one; what users say in between is not predicted.
    """

    ids: list[int]
    spans: tuple[tuple[int, int], ...] | None = None
    """Start and stop in ``ids`` of what is predicted, in order; None: all of it."""
    reference_logp: float | None = None
    """Sum of the predicted tokens' log-probabilities under the reference model, if one is used."""
    reference_shared_logp: float | None = None
    """The same over the common length of a pair's responses, if the loss wants it."""

    @property
    def predicted(self) -> int:
        """Tokens that are predicted."""
        return len(self.ids) if self.spans is None else sum(stop - start for start, stop in self.spans)


@dataclass(frozen=True)
class Example:
    """One row of data as tokens: a prompt, of which nothing is predicted, and the responses that share it.

    A preference pair has two, the chosen and the rejected one. A conversation has one, and so has an answer with a
    label.
    """

    example_id: str
    prompt_ids: list[int]
    """At least one token, from which the first of a response is predicted."""
    responses: tuple[Response, ...]
    desirable: bool | None = None
    """Whether an only response is one to learn or to avoid, where the data says so."""

    @property
    def kind(self) -> str:
        """One of `pairs`, `conversations` and `answers`."""
        if len(self.responses) == 2:
            return PAIRS
        return CONVERSATIONS if self.desirable is None else ANSWERS

    @classmethod
    def pair(
        cls,
        example_id: str,
        prompt_ids: list[int],
        chosen_ids: list[int],
        rejected_ids: list[int],
        reference_chosen_logp: float | None = None,
        reference_rejected_logp: float | None = None,
        reference_shared_logps: tuple[float, float] | None = None,
    ) -> Example:
        """A preference pair."""
        shared = reference_shared_logps or (None, None)
        chosen = Response(chosen_ids, None, reference_chosen_logp, shared[0])
        return cls(example_id, prompt_ids, (chosen, Response(rejected_ids, None, reference_rejected_logp, shared[1])))


@dataclass(kw_only=True)
class PackedRow:
    """Whole examples laid behind each other: a row of ``T`` tokens, or the part that a context-parallel rank has.

    All examples of a row have the same number of responses, ``R``: two in pairs, one in conversations.
    """

    input_ids: Tensor
    """``[1, T]`` int64; of a part ``[1, T / cp]``."""
    position_ids: Tensor
    """As ``input_ids``; responses continue the positions of their prompt."""
    predict_positions: Tensor
    """``[P]`` int64: where in the row, or this part of it, the hidden state stands that predicts a response token; of a
    part, only of tokens that are predicted there."""
    target_ids: Tensor
    """``[P]`` int64: that response token."""
    sequence_index: Tensor
    """``[P]`` int64: the response it belongs to, ``R * example`` for its first and ``R * example + 1`` for a second."""
    example_index: Tensor
    """``[B]`` int64: the place in the global batch of each example of the whole row."""
    response_lengths: Tensor
    """``[B, R]`` float32: predicted tokens of each response."""
    reference_logps: Tensor | None = None
    """``[B, R]`` float32: reference sums of each response; ``[B, 2 R]`` with those over the common length behind."""
    desirable: Tensor | None = None
    """``[B]`` bool, where the examples say it."""

    @property
    def num_examples(self) -> int:
        """Examples in the row, ``B``."""
        return self.example_index.numel()

    @property
    def num_responses(self) -> int:
        """Responses of each example, ``R``."""
        return self.response_lengths.shape[1]


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
