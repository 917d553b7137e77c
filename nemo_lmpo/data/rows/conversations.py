"""Rows without a rejected answer: conversations, prompts with completions, instructions, answers with a label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_lmpo.config.row_fields import CONVERSATION_FIELDS
from nemo_lmpo.data.messages import (
    Message,
    RowError,
    fields_of,
    is_list,
    is_message,
    kind,
    structured,
    text,
    text_of,
    whole_messages,
)
from nemo_lmpo.data.rows.pairs import check_prompt
from nemo_lmpo.data.rows.prompts import answer_of, prompt_messages
from nemo_lmpo.data.rows.transcripts import awaits_answer, is_transcript, turns_of
from nemo_lmpo.data.schema import ConversationRow, UnpairedRow
from nemo_lmpo.errors import shown

_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def conversation_field(row: Mapping[str, Any]) -> str | None:
    """The column that holds a conversation; None if there is none."""
    return next((name for name in CONVERSATION_FIELDS if row.get(name) is not None), None)


def parse_conversation_row(row: Mapping[str, Any]) -> tuple[ConversationRow, set[str]]:
    """A conversation from its `messages` (or `conversations`, `conversation`), and the columns that it was made of.

    Raises:
        RowError: there is none, or it cannot be used.
    """
    name = conversation_field(row)
    if name is None:
        known = ", ".join(CONVERSATION_FIELDS)
        raise RowError("missing field", f"there is no field of {known} (fields: {shown(list(row))})")
    messages = _turns(row[name], name)
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("no answer", f"'{name}' has no message of the assistant, so there is nothing to learn")
    prompt = row.get("prompt")
    said = isinstance(prompt, str) and any(prompt.strip() in str(message.get("content")) for message in messages)
    return ConversationRow(messages), {name, "prompt"} if said else {name}


def _turns(value: Any, name: str) -> list[Message]:
    """Messages, ShareGPT's turns, Capybara's exchanges, texts of user and assistant in turn, or a transcript."""
    value = structured(value, name)
    if is_transcript(value):
        return turns_of(value, name)
    if is_message(value):
        value = [value]
    if not is_list(value):
        raise RowError("not text", f"the field '{name}' is {kind(value)}, not a list of messages")
    items = list(value)
    if items and all(isinstance(item, Mapping) and "input" in item and "output" in item for item in items):
        items = [item[side] for item in items for side in ("input", "output")]
    if items and all(isinstance(item, str) for item in items):
        return [
            {"role": ("user", "assistant")[place % 2], "content": text(item, f"text {place + 1} of '{name}'")}
            for place, item in enumerate(items)
        ]
    return whole_messages(items, name)


def parse_completion(row: Mapping[str, Any]) -> tuple[ConversationRow, set[str]]:
    """Prompt and `completion` as a conversation, and the columns that it was made of.

    Raises:
        RowError: the row cannot be used.
    """
    return _answered(row, "completion")


def parse_instruction(row: Mapping[str, Any]) -> tuple[ConversationRow, set[str]]:
    """Alpaca's `instruction`, `input` and `output` as a conversation, and the columns that it was made of.

    Raises:
        RowError: the row cannot be used.
    """
    return _answered(row, "output")


def _answered(row: Mapping[str, Any], name: str) -> tuple[ConversationRow, set[str]]:
    if row.get(name) is None:
        raise RowError("missing field", f"the field '{name}' is missing (fields: {shown(list(row))})")
    prompt, used = prompt_messages(row)
    check_prompt(prompt)
    answer = answer_of(row[name], name, transcript=awaits_answer(row.get("prompt")))
    return ConversationRow([*prompt, *answer], prompt_messages=len(prompt)), {name, *used}


def is_label(value: Any) -> bool:
    """Whether a value says that an answer is good, or that it is bad."""
    return str(value).strip().lower() in _LABELS and not is_list(value)


def parse_unpaired(row: Mapping[str, Any]) -> tuple[UnpairedRow, set[str]]:
    """Prompt, `completion` and `label`, and the columns used.

    Raises:
        RowError: the row cannot be used.
    """
    parsed, used = _answered(row, "completion")
    return unpaired_of(parsed, row.get("label")), {"label", *used}


def unpaired_of(conversation: ConversationRow, said: Any) -> UnpairedRow:
    """The last answer of a conversation with what its `label` says.

    Raises:
        RowError: the label is not one, or the conversation does not end with an answer behind a prompt.
    """
    if not is_label(said):
        value = "null" if said is None else shown(said)
        raise RowError("not a label", f"the field 'label' is {value}, not true or false; give true, false, 1 or 0")
    *prompt, answer = conversation.messages
    if answer["role"] != "assistant":
        raise RowError(
            "wrong last role",
            f"the conversation ends with a message of role {shown(answer['role'])}, not 'assistant', so the label "
            "judges no answer",
        )
    check_prompt(prompt)
    if not text_of(answer).strip() and not fields_of(answer):
        raise RowError("empty response", "the answer is empty")
    columns = tuple(name for name in conversation.columns if name != "label")
    label = _LABELS[str(said).strip().lower()]
    return UnpairedRow(prompt, answer, label, conversation.inputs, columns, conversation.notes)
