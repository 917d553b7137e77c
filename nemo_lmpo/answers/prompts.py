"""Prompts from a file, and as token ids exactly as training renders them. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_lmpo.data.messages import (
    PLAIN_INPUTS,
    Inputs,
    Message,
    RowError,
    row_inputs,
    structured,
    text_of,
    whole_messages,
)
from nemo_lmpo.errors import DataError, first_line

if TYPE_CHECKING:
    from nemo_lmpo.data.encode import PairEncoder


@dataclass(frozen=True)
class Prompt:
    """One line of a prompts file."""

    place: str
    """File and line, for errors."""
    given: Any
    """The `prompt` field as it was."""
    messages: list[Message]
    inputs: Inputs = PLAIN_INPUTS
    """The line's `tools` and `chat_template_kwargs`."""


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """Read a JSON Lines file whose lines have a `prompt`: a text, or messages of which the last is the user's.

    A line's `tools` and `chat_template_kwargs` go to the chat template.

    Raises:
        DataError: the file is missing, empty or not JSON Lines; names the line.
    """
    try:
        # Not str.splitlines: U+2028, U+2029 and U+0085 end its lines, and may stand in JSON texts as they are.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"--prompts {path} cannot be read ({reason}); give a JSON Lines file") from None
    prompts = [_prompt(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise DataError(f'--prompts {path} holds no prompts; write lines such as {{"prompt": "Hello"}}')
    return prompts[:limit]


def _prompt(line: str, place: str) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON ({first_line(error)}); write one object per line") from None
    if not isinstance(row, dict) or "prompt" not in row:
        raise DataError(f'{place} has no field `prompt`; write lines such as {{"prompt": "Hello"}}')
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(f"{place} holds half a surrogate pair, which is not a character; remove it") from None
    try:
        messages = _messages(structured(row["prompt"], "prompt"))
        return Prompt(place, row["prompt"], messages, row_inputs(row))
    except RowError as error:
        raise DataError(f"{place}: {error}") from None


def _messages(prompt: Any) -> list[Message]:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise RowError("not messages", "`prompt` is neither text nor a list of messages")
    messages = whole_messages(prompt, "prompt")
    last = messages[-1]
    if last["role"] not in ("user", "tool") or not text_of(last).strip():
        raise RowError("wrong last role", "the prompt does not end with a text of the user; add one")
    return messages


def encode_prompts(prompts: Sequence[Prompt], encoder: PairEncoder) -> list[list[int]]:
    """Token ids of each prompt, up to where its response begins: the template's generation prompt.

    Raises:
        DataError: the chat template refuses a prompt.
    """
    from nemo_lmpo.data.messages import RowError

    ids = []
    encoded = encoder.encode_prompts([(prompt.messages, prompt.inputs) for prompt in prompts])
    for prompt, row in zip(prompts, encoded, strict=True):
        if isinstance(row, RowError):
            raise DataError(f"{prompt.place}: {row.detail}")
        if not row:
            raise DataError(f"{prompt.place}: the prompt has no tokens, so nothing could predict an answer")
        ids.append(row)
    return ids
