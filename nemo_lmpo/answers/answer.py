"""What a model answered: the one form of it for `generate`, evaluations and tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """A model's answer to one prompt."""

    text: str
    token_ids: Sequence[int] | None = None
    """The token that ended it included; None where a server or a file does not say."""
    finished: bool = True
    """Whether the model ended it itself, and not the limit of tokens."""
    count: int | None = None
    """Number of tokens where the ids are not known but their number is."""

    @property
    def tokens(self) -> int | None:
        """Number of tokens, the one that ended it included; None where that is not known."""
        return self.count if self.token_ids is None else len(self.token_ids)
