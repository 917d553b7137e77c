"""Transcripts as Anthropic's HH has them: one text with `Human:` and `Assistant:` in front of each turn."""

from __future__ import annotations

import re
from typing import Any

from nemo_lmpo.data.messages import Message, RowError, text, text_of

_TURN = re.compile(r"\n\n(Human|Assistant):")
_START = re.compile(r"\n*(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def has_turns(value: Any) -> bool:
    """Whether a turn begins somewhere in a text."""
    return isinstance(value, str) and _TURN.search(value) is not None


def is_transcript(value: Any) -> bool:
    """Whether a text begins with a turn and has one of the assistant's."""
    return isinstance(value, str) and _START.match(value) is not None and "\n\nAssistant:" in value


def begins_with_turn(value: Any) -> bool:
    """Whether a text begins as a transcript does."""
    return isinstance(value, str) and _START.match(value) is not None


def awaits_answer(value: Any) -> bool:
    """Whether a text is a transcript that ends where the assistant speaks."""
    return begins_with_turn(value) and value.rstrip().endswith("\n\nAssistant:")


def prompt_of(transcript: str, name: str) -> list[Message]:
    """The messages of a transcript that ends where the assistant speaks.

    Raises:
        RowError: it does not.
    """
    turns = turns_of(transcript, name)
    if turns[-1] != {"role": "assistant", "content": ""}:
        raise RowError("not a transcript", f"the transcript '{name}' does not end with 'Assistant:'")
    return turns[:-1]


def split_transcript(value: Any, name: str) -> tuple[list[Message], str]:
    """Prompt and last answer of a transcript.

    Raises:
        RowError: it is none, or ends with the user.
    """
    messages = turns_of(text(value, f"the field '{name}'"), name)
    if messages[-1]["role"] != "assistant":
        raise RowError("wrong last role", f"the transcript '{name}' ends with Human, not with Assistant")
    return messages[:-1], text_of(messages[-1])


def turns_of(said: str, name: str) -> list[Message]:
    """The messages of a transcript, blanks around each text left out.

    Raises:
        RowError: it does not begin with a turn.
    """
    before, *turns = _TURN.split(said if said.startswith("\n\n") else "\n\n" + said.lstrip("\n"))
    if before.strip() or not turns:
        raise RowError("not a transcript", f"'{name}' does not begin with 'Human:' or 'Assistant:'")
    return [
        {"role": _ROLES[speaker], "content": words.strip()}
        for speaker, words in zip(turns[::2], turns[1::2], strict=True)
    ]
