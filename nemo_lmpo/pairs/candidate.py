"""A candidate answer, and which of a prompt's candidates can be in a pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_lmpo.data.messages import PLAIN_INPUTS, Inputs, Message, text_of

CUT, EMPTY, EQUAL_TEXT, NO_SCORE = "cut off", "empty", "equal to another answer", "without a score"
"""Why a candidate is in no pair."""


@dataclass(frozen=True)
class AskedPrompt:
    """A prompt that answers are sampled for."""

    id: str
    """A hash of what the model sees."""
    messages: list[Message]
    inputs: Inputs = PLAIN_INPUTS
    row: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The whole row that it stood in."""

    @property
    def given(self) -> str | list[Message]:
        """Text if it is one message of the user, else the messages."""
        if len(self.messages) == 1 and set(self.messages[0]) == {"role", "content"}:
            return text_of(self.messages[0])
        return self.messages


@dataclass(frozen=True)
class Candidate:
    """One sampled answer."""

    name: str
    """Of the prompt's id and the sample: the key of the journals."""
    model: int
    """Which of the models gave it."""
    seed: int
    text: str
    tokens: int
    """Of the text, by the first model's tokenizer: one measure for all models."""
    finished: bool
    score: float | None = None
    controlled: float | None = None
    """The score without what length explains of it."""

    @property
    def value(self) -> float:
        """The score that the rule goes by."""
        value = self.score if self.controlled is None else self.controlled
        assert value is not None
        return value


@dataclass(frozen=True)
class Answered:
    """A prompt with its candidates, in the order of models and seeds."""

    prompt: AskedPrompt
    candidates: Sequence[Candidate]

    def usable(self, left_out: Counter[str] | None = None) -> list[Candidate]:
        """Candidates that can be in a pair, scores aside: of equal texts the first.

        Args:
            left_out: counts the others by reason.
        """
        found: dict[str, Candidate] = {}
        reasons: Counter[str] = Counter()
        for candidate in self.candidates:
            text = candidate.text.strip()
            if not candidate.finished:
                reasons[CUT] += 1
            elif not text:
                reasons[EMPTY] += 1
            elif text in found:
                reasons[EQUAL_TEXT] += 1
            else:
                found[text] = candidate
        if left_out is not None:
            left_out.update(reasons)
        return list(found.values())
