"""The prompt of a row that has prompt and answer apart, wherever it stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_lmpo.data.messages import Message, RowError, is_list, is_message, kind, message_list, structured, text
from nemo_lmpo.data.rows.transcripts import awaits_answer, prompt_of
from nemo_lmpo.errors import shown

PROMPT_FIELDS = ("prompt", "instruction", "messages", "conversations")
"""Where a prompt may stand, in the order in which it is looked for."""


def instruction_of(row: Mapping[str, Any]) -> tuple[str | None, set[str]]:
    """Alpaca's `instruction`, and on the next line its `input` where that says something; the columns used."""
    instruction, more = row.get("instruction"), row.get("input")
    if instruction is None:
        return None, set()
    said = text(instruction, "the field 'instruction'")
    if isinstance(more, str) and more.strip():
        return "\n".join([said, text(more, "the field 'input'")]), {"instruction", "input"}
    return said, {"instruction", "input"} if isinstance(more, str) else {"instruction"}


def prompt_messages(row: Mapping[str, Any]) -> tuple[list[Message], set[str]]:
    """The prompt as messages, and the columns it stands in.

    Raises:
        RowError: there is none, or it is none.
    """
    for name in PROMPT_FIELDS:
        if row.get(name) is None:
            continue
        if name == "instruction":
            said, used = instruction_of(row)
            return [{"role": "user", "content": said or ""}], used
        return messages_of(row[name], name), {name}
    raise RowError("missing field", f"there is no prompt beside the answer (fields: {shown(list(row))})")


def messages_of(value: Any, name: str) -> list[Message]:
    """A prompt that is a text, a transcript that awaits an answer, a message or messages.

    Raises:
        RowError: it is none of these.
    """
    value = structured(value, name)
    if is_list(value) or is_message(value):
        return message_list(value, name)
    if not isinstance(value, str):
        raise RowError("not text", f"the field '{name}' is {kind(value)}, neither text nor messages")
    if awaits_answer(value):
        return prompt_of(value, name)
    return [{"role": "user", "content": text(value, f"the field '{name}'")}]


def answer_of(value: Any, name: str, *, transcript: bool = False) -> list[Message]:
    """The messages that answer a prompt: of a text one; the last is the assistant's.

    Args:
        value: a text, a message, or a list of messages behind the prompt.
        name: of the field, for messages.
        transcript: the prompt is one, so that blanks around the answer are its separators.

    Raises:
        RowError: it is none of these, says nothing, or does not end with the assistant.
    """
    value = structured(value, name)
    if is_list(value) or is_message(value):
        messages = message_list(value, name)
        if messages[-1]["role"] != "assistant":
            role = shown(messages[-1]["role"])
            raise RowError("wrong last role", f"'{name}' ends with a message of role {role}, not 'assistant'")
        return messages
    said = text(value, f"the field '{name}'")
    if not said.strip():
        raise RowError("empty response", f"the field '{name}' is empty")
    return [{"role": "assistant", "content": said.strip() if transcript else said}]
