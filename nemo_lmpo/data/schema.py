"""Rows of any supported schema, turned into one form: prompt messages, chosen text, rejected text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_lmpo.errors import shown

ROLES = ("system", "user", "assistant")

Message = dict[str, Any]
"""`role`, `content`, and whatever else the row has of it."""

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


class RowError(Exception):
    """A row that cannot be used: ``reason`` groups such rows in counts, ``detail`` explains this one."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return self.detail


@dataclass(frozen=True)
class Inputs:
    """What a chat template gets beside the messages."""

    tools: list[Any] | None = None
    """Descriptions of the tools that the model may call."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the template by name (a row's `chat_template_kwargs`)."""


PLAIN_INPUTS = Inputs()


@dataclass(frozen=True)
class PreferenceRow:
    """A row in the one form that everything behind the reader knows."""

    prompt: list[Message]
    """Whole messages; the last is the user's, or a tool's."""
    chosen: str
    rejected: str
    chosen_fields: Message = field(default_factory=dict)
    """What the chosen message has beside its text (`tool_calls`, `reasoning_content`, ...)."""
    rejected_fields: Message = field(default_factory=dict)
    inputs: Inputs = PLAIN_INPUTS
    """What the chat template gets beside the messages."""

    @property
    def chosen_message(self) -> Message:
        """The chosen answer as a message."""
        return {"role": "assistant", "content": self.chosen, **self.chosen_fields}

    @property
    def rejected_message(self) -> Message:
        """The rejected answer as a message."""
        return {"role": "assistant", "content": self.rejected, **self.rejected_fields}

    @property
    def has_fields(self) -> bool:
        """Whether an answer has more than a text."""
        return bool(self.chosen_fields or self.rejected_fields)


def detect_schema(row: Mapping[str, Any]) -> str:
    """The schema a row looks like: `messages` if any field is a list, `hh` for transcripts, else `strings`."""
    fields = [row.get(name) for name in ("prompt", "chosen", "rejected")]
    if any(_is_list(field) for field in fields):
        return "messages"
    chosen = row.get("chosen")
    if row.get("prompt") is None and isinstance(chosen, str) and _HH_TURN.search(chosen):
        return "hh"
    return "strings"


def parse_row(row: Any, schema: str = "auto") -> PreferenceRow:
    """Bring a row into the one form and check it.

    Args:
        row: a mapping with `chosen`, `rejected` and, but for transcripts, `prompt`; or why it could not be read.
        schema: as `data.train.schema`.

    Raises:
        RowError: the row cannot be used.
    """
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, Mapping):
        raise RowError("not an object", f"the row is {_kind(row)}, not an object with fields")
    schema = detect_schema(row) if schema == "auto" else schema
    required = ("chosen", "rejected") if schema in ("hh", "messages") else ("prompt", "chosen", "rejected")
    for name in required:
        if row.get(name) is None:
            raise RowError("missing field", f"the field '{name}' is missing (fields: {shown(list(row))})")
    parsed = {"messages": _parse_messages, "strings": _parse_strings, "hh": _parse_hh}[schema](row)
    return _checked(parsed)


def _checked(parsed: PreferenceRow) -> PreferenceRow:
    for name, text in (("chosen", parsed.chosen), ("rejected", parsed.rejected)):
        if not text.strip():
            raise RowError("empty response", f"the {name} response is empty")
    if parsed.chosen.strip() == parsed.rejected.strip():
        raise RowError("chosen equals rejected", "the chosen and the rejected response are equal")
    if not parsed.prompt:
        raise RowError("missing prompt", "there is no prompt in front of the responses")
    if parsed.prompt[-1]["role"] != "user":
        raise RowError(
            "wrong last role", f"the prompt ends with a message of role {shown(parsed.prompt[-1]['role'])}, not 'user'"
        )
    return parsed


def _parse_strings(row: Mapping[str, Any]) -> PreferenceRow:
    texts = {name: _text(row[name], f"the field '{name}'") for name in ("prompt", "chosen", "rejected")}
    return PreferenceRow([{"role": "user", "content": texts["prompt"]}], texts["chosen"], texts["rejected"])


def _parse_messages(row: Mapping[str, Any]) -> PreferenceRow:
    prompt = row.get("prompt")
    given: list[Message] | None = None
    if _is_list(prompt):
        given = _messages(prompt, "prompt")
    chosen_prompt, chosen = _split_response(row["chosen"], "chosen", given)
    rejected_prompt, rejected = _split_response(row["rejected"], "rejected", given)
    if given is None and isinstance(prompt, str) and not chosen_prompt and not rejected_prompt:
        chosen_prompt = rejected_prompt = [{"role": "user", "content": prompt}]
    if chosen_prompt != rejected_prompt:
        raise RowError("prompts differ", "the prompts of the chosen and the rejected conversation differ")
    if isinstance(prompt, str):
        _check_prompt_text(prompt, chosen_prompt)
    return PreferenceRow(chosen_prompt, chosen, rejected)


def _split_response(value: Any, name: str, prompt: list[Message] | None) -> tuple[list[Message], str]:
    """Prompt messages and response text of one side: a text, the response's messages, or the whole conversation."""
    if not _is_list(value):
        text = _text(value, f"the field '{name}'")
        if prompt is None:
            raise RowError("not text", f"the field '{name}' is text, but the other fields need a list of messages")
        return prompt, text
    messages = _messages(value, name)
    if messages[-1]["role"] != "assistant":
        raise RowError(
            "wrong last role", f"'{name}' ends with a message of role {shown(messages[-1]['role'])}, not 'assistant'"
        )
    before = messages[:-1]
    if prompt is not None and before and before != prompt:
        raise RowError("prompts differ", f"'{name}' does not begin with the messages of 'prompt'")
    return (prompt if prompt is not None else before), messages[-1]["content"]


def _check_prompt_text(prompt: str, messages: list[Message]) -> None:
    """A `prompt` text beside whole conversations must be about the same prompt, in whatever format it is."""
    text = prompt.strip()
    contents = [content for message in messages if (content := message["content"].strip())]
    if text and contents and not any(text in content or content in text for content in contents):
        raise RowError("prompts differ", "the text of 'prompt' occurs in no message in front of the responses")


def _parse_hh(row: Mapping[str, Any]) -> PreferenceRow:
    chosen_prompt, chosen = _split_transcript(row["chosen"], "chosen")
    rejected_prompt, rejected = _split_transcript(row["rejected"], "rejected")
    if chosen_prompt != rejected_prompt:
        raise RowError("prompts differ", "the chosen and the rejected transcript differ before the last answer")
    return PreferenceRow(chosen_prompt, chosen, rejected)


def _split_transcript(value: Any, name: str) -> tuple[list[Message], str]:
    text = _text(value, f"the field '{name}'")
    before, *turns = _HH_TURN.split(text if text.startswith("\n\n") else "\n\n" + text.lstrip("\n"))
    if before.strip() or not turns:
        raise RowError("not a transcript", f"'{name}' does not begin with 'Human:' or 'Assistant:'")
    messages = [
        {"role": _HH_ROLES[speaker], "content": said.strip()}
        for speaker, said in zip(turns[::2], turns[1::2], strict=True)
    ]
    if messages[-1]["role"] != "assistant":
        raise RowError("wrong last role", f"the transcript '{name}' ends with Human, not with Assistant")
    return messages[:-1], messages[-1]["content"]


def _is_list(value: Any) -> bool:
    """A list of messages as JSON, `datasets` and Parquet (numpy arrays) give it."""
    return not isinstance(value, str | bytes | Mapping) and (isinstance(value, Sequence) or hasattr(value, "tolist"))


def _messages(value: Any, name: str) -> list[Message]:
    messages = []
    for number, message in enumerate(value, start=1):
        where = f"message {number} of '{name}'"
        if not isinstance(message, Mapping) or message.get("role") is None:
            raise RowError("missing field", f"{where} is not an object with 'role' and 'content'")
        if message["role"] not in ROLES:
            raise RowError("unknown role", f"{where} has the role {shown(message['role'])}; known: {', '.join(ROLES)}")
        messages.append({"role": message["role"], "content": _text(message.get("content"), f"the content of {where}")})
    if not messages:
        raise RowError("missing field", f"'{name}' is an empty list")
    return messages


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RowError("not text", f"{where} is {_kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError("not text", f"{where} holds half a surrogate pair, which is no character") from None
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"
