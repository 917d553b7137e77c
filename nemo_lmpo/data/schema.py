"""Rows of any supported schema, turned into one form: prompt messages and two answers. Nothing is left out silently."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_lmpo.data.messages import (
    PLAIN_INPUTS,
    Inputs,
    Message,
    RowError,
    fields_of,
    is_list,
    kind,
    label,
    one_message,
    row_inputs,
    structured,
    text,
    text_of,
    whole_messages,
)
from nemo_lmpo.errors import shown

USED_COLUMNS = {"prompt", "chosen", "rejected", "prompt_id", "id", "system", "history", "tools", "chat_template_kwargs"}
MEANINGFUL_COLUMNS = {
    *("image", "images", "video", "videos", "audio", "audios", "documents", "functions", "system_prompt", "context"),
    "input",
}
"""Columns that nothing here uses, though they would mean something to a model."""
_MOST_COLUMNS = 16
"""Unused columns of a row that are noted at most."""

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_START = re.compile(r"\n*(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


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
    columns: tuple[str, ...] = field(default=(), compare=False)
    """Columns of the row that nothing uses."""

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
    """The schema a row looks like: `messages` if a field is a list or message, `hh` for transcripts, else `strings`."""
    fields = [row.get(name) for name in ("prompt", "chosen", "rejected")]
    if any(is_list(value) or _is_message(value) for value in fields):
        return "messages"
    prompt, *answers = fields
    if prompt is None and isinstance(answers[0], str) and _HH_TURN.search(answers[0]):
        return "hh"
    opens = isinstance(prompt, str) and _HH_START.match(prompt) and prompt.rstrip().endswith("\n\nAssistant:")
    return "hh" if opens or any(map(_is_transcript, answers)) else "strings"


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value


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
        raise RowError("not an object", f"the row is {kind(row)}, not an object with fields")
    given = row
    if schema in ("auto", "messages"):
        row = {**row, **{name: structured(row.get(name), name) for name in ("prompt", "chosen", "rejected")}}
    schema = detect_schema(row) if schema == "auto" else schema
    required = ("chosen", "rejected") if schema in ("hh", "messages") else ("prompt", "chosen", "rejected")
    for name in required:
        if row.get(name) is None:
            raise RowError("missing field", f"the field '{name}' is missing (fields: {shown(list(given))})")
    parsed = {"messages": _parse_messages, "strings": _parse_strings, "hh": _parse_hh}[schema](row)
    return _checked(_with_columns(parsed, row))


def _with_columns(parsed: PreferenceRow, row: Mapping[str, Any]) -> PreferenceRow:
    """The row with what its other columns say."""
    unused = [str(name) for name, value in row.items() if name not in USED_COLUMNS and not _is_empty(value)]
    unused = sorted(unused, key=lambda name: (name not in MEANINGFUL_COLUMNS, name))[:_MOST_COLUMNS]
    prompt = _with_history(parsed.prompt, row)
    return replace(parsed, prompt=_with_system(prompt, row), inputs=row_inputs(row), columns=tuple(map(label, unused)))


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _with_system(prompt: list[Message], row: Mapping[str, Any]) -> list[Message]:
    if _is_empty(row.get("system")):
        return prompt
    system = {"role": "system", "content": text(row["system"], "the field 'system'")}
    if prompt and prompt[0]["role"] in ("system", "developer"):
        if text_of(prompt[0]).strip() != system["content"].strip():
            raise RowError("prompts differ", "the field 'system' differs from the system message")
        return prompt
    return [system, *prompt]


def _with_history(prompt: list[Message], row: Mapping[str, Any]) -> list[Message]:
    """Earlier exchanges, each a question and its answer, in front of the prompt."""
    if _is_empty(row.get("history")):
        return prompt
    turns: list[Message] = []
    if not is_list(row["history"]):
        raise RowError("not a history", f"the field 'history' is {kind(row['history'])}, not a list of pairs of texts")
    for turn in row["history"]:
        if not is_list(turn) or len(turn) != 2:
            raise RowError("not a history", f"the field 'history' holds {shown(turn)}, not a question and its answer")
        question, answer = (text(said, "a text of 'history'") for said in turn)
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    first = 1 if prompt and prompt[0]["role"] in ("system", "developer") else 0
    return [*prompt[:first], *turns, *prompt[first:]]


def _checked(parsed: PreferenceRow) -> PreferenceRow:
    for name, said, fields in (
        ("chosen", parsed.chosen, parsed.chosen_fields),
        ("rejected", parsed.rejected, parsed.rejected_fields),
    ):
        if not said.strip() and not fields:
            raise RowError("empty response", f"the {name} response is empty")
    if parsed.chosen.strip() == parsed.rejected.strip() and parsed.chosen_fields == parsed.rejected_fields:
        raise RowError("chosen equals rejected", "the chosen and the rejected response are equal")
    if not parsed.prompt:
        raise RowError("missing prompt", "there is no prompt in front of the responses")
    if parsed.prompt[-1]["role"] not in ("user", "tool"):
        raise RowError(
            "wrong last role", f"the prompt ends with a message of role {shown(parsed.prompt[-1]['role'])}, not 'user'"
        )
    return parsed


def _row(prompt: list[Message], chosen: Message, rejected: Message) -> PreferenceRow:
    return PreferenceRow(prompt, text_of(chosen), text_of(rejected), fields_of(chosen), fields_of(rejected))


def _parse_strings(row: Mapping[str, Any]) -> PreferenceRow:
    texts = {name: text(row[name], f"the field '{name}'") for name in ("prompt", "chosen", "rejected")}
    return PreferenceRow([{"role": "user", "content": texts["prompt"]}], texts["chosen"], texts["rejected"])


def _parse_messages(row: Mapping[str, Any]) -> PreferenceRow:
    prompt = row.get("prompt")
    given: list[Message] | None = None
    if is_list(prompt):
        given = whole_messages(prompt, "prompt")
    elif isinstance(prompt, str) and any(isinstance(row[name], str) for name in ("chosen", "rejected")):
        given = [{"role": "user", "content": text(prompt, "the field 'prompt'")}]
    elif _is_message(prompt):
        given = [one_message(prompt, "'prompt'")]
    chosen_prompt, chosen = _split_response(row["chosen"], "chosen", given)
    rejected_prompt, rejected = _split_response(row["rejected"], "rejected", given)
    if given is None and isinstance(prompt, str) and not chosen_prompt and not rejected_prompt:
        chosen_prompt = rejected_prompt = [{"role": "user", "content": text(prompt, "the field 'prompt'")}]
    if chosen_prompt != rejected_prompt:
        raise RowError("prompts differ", "the prompts of the chosen and the rejected conversation differ")
    if isinstance(prompt, str):
        _check_prompt_text(prompt, chosen_prompt)
    return _row(chosen_prompt, chosen, rejected)


def _split_response(value: Any, name: str, prompt: list[Message] | None) -> tuple[list[Message], Message]:
    """Prompt messages and answer of one side: a text, the answer's message or messages, or the whole conversation."""
    if _is_message(value):
        value = [value]
    if not is_list(value):
        said = text(value, f"the field '{name}'")
        if prompt is None:
            raise RowError("not text", f"the field '{name}' is text, but the other fields need a list of messages")
        return prompt, {"role": "assistant", "content": said}
    messages = whole_messages(value, name)
    if messages[-1]["role"] != "assistant":
        raise RowError(
            "wrong last role", f"'{name}' ends with a message of role {shown(messages[-1]['role'])}, not 'assistant'"
        )
    before = messages[:-1]
    if prompt is not None and before and before != prompt:
        raise RowError("prompts differ", f"'{name}' does not begin with the messages of 'prompt'")
    return (prompt if prompt is not None else before), messages[-1]


def _check_prompt_text(prompt: str, messages: list[Message]) -> None:
    """A `prompt` text beside whole conversations must be about the same prompt, in whatever format it is."""
    wanted = prompt.strip()
    contents = [content for message in messages if (content := text_of(message).strip())]
    if wanted and contents and not any(wanted in content or content in wanted for content in contents):
        raise RowError("prompts differ", "the text of 'prompt' occurs in no message in front of the responses")


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and _HH_START.match(value) is not None and "\n\nAssistant:" in value


def _parse_hh(row: Mapping[str, Any]) -> PreferenceRow:
    prompt = row.get("prompt")
    if isinstance(prompt, str) and _HH_START.match(prompt) and not _is_transcript(row["chosen"]):
        turns = _turns(prompt, "prompt")
        if turns[-1] != {"role": "assistant", "content": ""}:
            raise RowError("not a transcript", "the transcript 'prompt' does not end with 'Assistant:'")
        chosen, rejected = (text(row[name], f"the field '{name}'").strip() for name in ("chosen", "rejected"))
        return PreferenceRow(turns[:-1], chosen, rejected)
    chosen_prompt, chosen = _split_transcript(row["chosen"], "chosen")
    rejected_prompt, rejected = _split_transcript(row["rejected"], "rejected")
    if chosen_prompt != rejected_prompt:
        raise RowError("prompts differ", "the chosen and the rejected transcript differ before the last answer")
    if isinstance(prompt, str):
        _check_prompt_text(prompt, chosen_prompt)
    elif prompt is not None:
        raise RowError("not text", f"the field 'prompt' is {kind(prompt)}, not text, beside transcripts")
    return PreferenceRow(chosen_prompt, chosen, rejected)


def _split_transcript(value: Any, name: str) -> tuple[list[Message], str]:
    messages = _turns(text(value, f"the field '{name}'"), name)
    if messages[-1]["role"] != "assistant":
        raise RowError("wrong last role", f"the transcript '{name}' ends with Human, not with Assistant")
    return messages[:-1], text_of(messages[-1])


def _turns(said: str, name: str) -> list[Message]:
    before, *turns = _HH_TURN.split(said if said.startswith("\n\n") else "\n\n" + said.lstrip("\n"))
    if before.strip() or not turns:
        raise RowError("not a transcript", f"'{name}' does not begin with 'Human:' or 'Assistant:'")
    return [
        {"role": _HH_ROLES[speaker], "content": words.strip()}
        for speaker, words in zip(turns[::2], turns[1::2], strict=True)
    ]
