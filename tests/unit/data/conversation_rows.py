"""Conversations of tests, encoded, and which of their ids are predicted."""

from __future__ import annotations

from typing import Any

from nemo_lmpo.data.encode import EncodedRow, PairEncoder
from nemo_lmpo.data.schema import ConversationRow

LONG: dict[str, Any] = {"max_length": 4000, "max_prompt_length": 2000}


def said(*texts: Any) -> list[dict[str, Any]]:
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


PLAIN = said("What is it?", "Two things.", "Which ones?", " Good answer.", "And?", "A")
THOUGHTS = said("What?", "<think>\nHm.\n</think>\n\nGood.", "And?", "<think>\nWell.\n</think>\n\nFine.")
SYSTEM = [{"role": "system", "content": "Be kind."}, *PLAIN]


def encoded(encoder: PairEncoder, messages: list[dict[str, Any]], **fields: Any) -> Any:
    """The row, or the error that says why there is none: a test knows which."""
    (row,) = encoder.encode([ConversationRow(messages, **fields)])
    return row


def mask(row: EncodedRow) -> list[bool]:
    """Which ids of a row are predicted."""
    spans = row.spans or [0, len(row.chosen_ids)]
    flags = [False] * len(row.chosen_ids)
    for start, stop in zip(spans[::2], spans[1::2], strict=True):
        flags[start:stop] = [True] * (stop - start)
    return [False] * len(row.prompt_ids) + flags
