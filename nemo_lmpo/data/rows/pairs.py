"""Rows with a preferred and a rejected answer: as texts, messages or transcripts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_lmpo.config.row_fields import PAIR_FIELDS
from nemo_lmpo.data.messages import (
    Message,
    RowError,
    fields_of,
    is_list,
    is_message,
    kind,
    message_list,
    one_message,
    structured,
    text,
    text_of,
    whole_messages,
)
from nemo_lmpo.data.rows.prompts import instruction_of
from nemo_lmpo.data.rows.transcripts import (
    awaits_answer,
    begins_with_turn,
    has_turns,
    is_transcript,
    prompt_of,
    split_transcript,
)
from nemo_lmpo.data.schema import PreferenceRow
from nemo_lmpo.errors import shown

SIDES = ("chosen", "rejected")
PAIR_SCHEMAS = ("messages", "strings", "hh")


def pair_schema(row: Mapping[str, Any]) -> str:
    """What a pair looks like: `messages` if a field is a list or message, `hh` for transcripts, else `strings`."""
    fields = [row.get(name) for name in PAIR_FIELDS]
    if any(is_list(value) or is_message(value) for value in fields):
        return "messages"
    prompt, *answers = fields
    if prompt is None and has_turns(answers[0]):
        return "hh"
    return "hh" if awaits_answer(prompt) or any(map(is_transcript, answers)) else "strings"


def parse_pair(row: Mapping[str, Any], schema: str) -> tuple[PreferenceRow, set[str]]:
    """A pair, not yet checked, and the columns that it was made of.

    Args:
        row: has `chosen` or `rejected`.
        schema: one of :data:`PAIR_SCHEMAS`, or `auto`.

    Raises:
        RowError: the row cannot be used.
    """
    given = list(row)
    if schema in ("auto", "messages"):
        row = {**row, **{name: structured(row.get(name), name) for name in PAIR_FIELDS}}
    prompt, used = _prompt_elsewhere(row) if schema != "hh" else (None, set())
    if prompt is not None:
        row = {**row, "prompt": prompt}
    schema = pair_schema(row) if schema == "auto" else schema
    for name in SIDES if schema in ("hh", "messages") else PAIR_FIELDS:
        if row.get(name) is None:
            raise RowError("missing field", f"the field '{name}' is missing (fields: {shown(given)})")
    parsed = {"messages": _parse_messages, "strings": _parse_strings, "hh": _parse_hh}[schema](row)
    return parsed, {*PAIR_FIELDS, *used}


def _prompt_elsewhere(row: Mapping[str, Any]) -> tuple[Any, set[str]]:
    """The prompt of a row that has none of that name and only answers in its sides, and the columns it stands in."""
    if row.get("prompt") is not None or not all(_is_answer_alone(row.get(name)) for name in SIDES):
        return None, set()
    prompt, used = instruction_of(row)
    if prompt is not None:
        return prompt, used
    for name in ("conversations", "messages"):
        turns = structured(row.get(name), name)
        if is_list(turns) and len(turns) and all(map(is_message, turns)):
            return turns, {name}
    return None, set()


def _is_answer_alone(value: Any) -> bool:
    if isinstance(value, str):
        return not has_turns(value) and not is_transcript(value)
    return is_message(value) or (is_list(value) and len(value) == 1)


def checked_pair(parsed: PreferenceRow, *, chosen_alone: bool = False) -> PreferenceRow:
    """A pair that has a prompt and two answers, of which one can be preferred.

    Args:
        parsed: the pair with all that stands in front of it.
        chosen_alone: the rejected answer does not matter.

    Raises:
        RowError: it has not.
    """
    for name, said, fields in (
        ("chosen", parsed.chosen, parsed.chosen_fields),
        ("rejected", parsed.rejected, parsed.rejected_fields),
    ):
        if not said.strip() and not fields and not (chosen_alone and name == "rejected"):
            raise RowError("empty response", f"the {name} response is empty")
    equal = parsed.chosen.strip() == parsed.rejected.strip() and parsed.chosen_fields == parsed.rejected_fields
    if equal and not chosen_alone:
        raise RowError("chosen equals rejected", "the chosen and the rejected response are equal")
    check_prompt(parsed.prompt)
    return parsed


def check_prompt(prompt: list[Message]) -> None:
    """Refuse a prompt that nobody has to answer.

    Raises:
        RowError: it is empty, or ends with another than the user or a tool.
    """
    if not prompt:
        raise RowError("missing prompt", "there is no prompt in front of the responses")
    if prompt[-1]["role"] not in ("user", "tool"):
        raise RowError(
            "wrong last role", f"the prompt ends with a message of role {shown(prompt[-1]['role'])}, not 'user'"
        )


def pair_of(prompt: list[Message], chosen: Message, rejected: Message) -> PreferenceRow:
    """A pair of whole messages."""
    return PreferenceRow(prompt, text_of(chosen), text_of(rejected), fields_of(chosen), fields_of(rejected))


def _parse_strings(row: Mapping[str, Any]) -> PreferenceRow:
    texts = {name: text(row[name], f"the field '{name}'") for name in PAIR_FIELDS}
    return PreferenceRow([{"role": "user", "content": texts["prompt"]}], texts["chosen"], texts["rejected"])


def _parse_messages(row: Mapping[str, Any]) -> PreferenceRow:
    prompt = row.get("prompt")
    given: list[Message] | None = None
    if is_list(prompt):
        given = whole_messages(prompt, "prompt")
    elif isinstance(prompt, str) and any(isinstance(row[name], str) for name in SIDES):
        given = [{"role": "user", "content": text(prompt, "the field 'prompt'")}]
    elif is_message(prompt):
        given = [one_message(prompt, "'prompt'")]
    chosen_prompt, chosen = _split_response(row["chosen"], "chosen", given)
    rejected_prompt, rejected = _split_response(row["rejected"], "rejected", given)
    if chosen_prompt != rejected_prompt:
        raise RowError(
            "prompts differ",
            "the prompts of the chosen and the rejected conversation differ; only their last answers may",
        )
    if given is None and isinstance(prompt, str):
        chosen_prompt = _with_prompt_text(prompt, chosen_prompt)
    return pair_of(chosen_prompt, chosen, rejected)


def _split_response(value: Any, name: str, prompt: list[Message] | None) -> tuple[list[Message], Message]:
    """Prompt messages and answer of one side: a text, the answer's message or messages, or the whole conversation."""
    if not is_list(value) and not is_message(value):
        said = text(value, f"the field '{name}'")
        if prompt is None:
            raise RowError("not text", f"the field '{name}' is text, but the other fields need a list of messages")
        return prompt, {"role": "assistant", "content": said}
    messages = message_list(value, name)
    if messages[-1]["role"] != "assistant":
        raise RowError(
            "wrong last role", f"'{name}' ends with a message of role {shown(messages[-1]['role'])}, not 'assistant'"
        )
    before = messages[:-1]
    if prompt is None or not before:
        return (prompt if prompt is not None else before), messages[-1]
    if before[0]["role"] == "assistant" and prompt[0]["role"] != "assistant":  # turns that go on behind the prompt
        before = [*prompt, *before]
    if before[: len(prompt)] != prompt:
        raise RowError("prompts differ", f"'{name}' does not begin with the messages of 'prompt'")
    return before, messages[-1]


def _with_prompt_text(prompt: str, messages: list[Message]) -> list[Message]:
    """The messages in front of the answers, and the `prompt` text in front of them where they go on from it."""
    first: Message = {"role": "user", "content": text(prompt, "the field 'prompt'")}
    if not messages:
        return [first]
    if messages[0]["role"] == "assistant" and not _stands_in(prompt, messages):
        return [first, *messages]
    check_prompt_text(prompt, messages)
    return messages


def check_prompt_text(prompt: str, messages: list[Message]) -> None:
    """A `prompt` text beside whole conversations must be about the same prompt, in whatever format it is.

    Raises:
        RowError: it is not.
    """
    if not _stands_in(prompt, messages):
        raise RowError("prompts differ", "the text of 'prompt' occurs in no message in front of the responses")


def _stands_in(prompt: str, messages: list[Message]) -> bool:
    wanted = prompt.strip()
    contents = [content for message in messages if (content := text_of(message).strip())]
    return not wanted or not contents or any(wanted in content or content in wanted for content in contents)


def _parse_hh(row: Mapping[str, Any]) -> PreferenceRow:
    prompt = row.get("prompt")
    if begins_with_turn(prompt) and not is_transcript(row["chosen"]):
        before = prompt_of(str(prompt), "prompt")
        chosen, rejected = (text(row[name], f"the field '{name}'").strip() for name in SIDES)
        return PreferenceRow(before, chosen, rejected)
    chosen_prompt, chosen = split_transcript(row["chosen"], "chosen")
    rejected_prompt, rejected = split_transcript(row["rejected"], "rejected")
    if chosen_prompt != rejected_prompt:
        raise RowError("prompts differ", "the chosen and the rejected transcript differ before the last answer")
    if isinstance(prompt, str):
        check_prompt_text(prompt, chosen_prompt)
    elif prompt is not None:
        raise RowError("not text", f"the field 'prompt' is {kind(prompt)}, not text, beside transcripts")
    return PreferenceRow(chosen_prompt, chosen, rejected)
