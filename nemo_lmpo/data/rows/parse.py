"""A row of any known layout in the one form of its kind, and as the kind that a loss takes. Nothing goes silently."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nemo_lmpo.config.row_fields import ABOUT_OWN_PAIRS, ANSWER_LISTS, IN_EVERY_LAYOUT
from nemo_lmpo.data.messages import Message, RowError, is_list, kind, label, row_inputs, text, text_of
from nemo_lmpo.data.rows.conversations import (
    conversation_field,
    is_label,
    parse_completion,
    parse_conversation_row,
    parse_instruction,
    parse_unpaired,
    unpaired_of,
)
from nemo_lmpo.data.rows.guess import guessed_line
from nemo_lmpo.data.rows.pairs import PAIR_SCHEMAS, SIDES, checked_pair, parse_pair
from nemo_lmpo.data.rows.ranked import parse_ranked, ranked_field
from nemo_lmpo.data.schema import MEANINGFUL_COLUMNS, ConversationRow, PreferenceRow, Row, UnpairedRow
from nemo_lmpo.errors import shown

_MOST_COLUMNS = 16
"""Unused columns of a row that are noted at most."""


def detect_schema(row: Mapping[str, Any]) -> str:
    """The layout a row looks like, as `data.train.schema` calls it; `pair` for all that have chosen and rejected."""
    if any(row.get(name) is not None for name in SIDES):
        return "pair"
    if row.get("completion") is not None:
        return "completion"
    if ranked_field(row) is not None:
        return "ranked"
    if conversation_field(row) is not None:
        return "conversation"
    if row.get("instruction") is not None and row.get("output") is not None:
        return "instruction"
    if any(row.get(name) is not None for name in ANSWER_LISTS):
        return "ranked"
    return "unknown"


def parse_row(row: Any, schema: str = "auto") -> Row:
    """Bring a row into the one form of its kind and check it.

    Args:
        row: a mapping; or why it could not be read.
        schema: as `data.train.schema`.

    Raises:
        RowError: the row cannot be used.
    """
    return _parsed(row, schema, chosen_alone=False)


def parse_preference(row: Any, schema: str = "auto") -> PreferenceRow:
    """As :func:`parse_row`, for losses that compare two answers.

    Raises:
        RowError: the row cannot be used, or is not a pair.
    """
    found = parse_row(row, schema)
    if isinstance(found, PreferenceRow):
        return found
    if isinstance(found, UnpairedRow):
        detail = "the row is one answer with a label, not a pair; loss=kto trains on such rows, or give pairs"
    else:
        detail = "the row is a conversation without a preferred and a rejected answer; loss=sft trains on such rows"
    raise RowError("other kind of row", detail)


def parse_judged(row: Any, schema: str = "auto") -> PreferenceRow | UnpairedRow:
    """As :func:`parse_row`, for losses that take good and bad answers by themselves (KTO): pairs, or labels.

    A conversation with a `label` is its last answer, behind all that stands before it.

    Raises:
        RowError: the row cannot be used, or nothing says whether its answer is good.
    """
    found = parse_row(row, schema)
    if not isinstance(found, ConversationRow):
        return found
    if "label" in row:
        return unpaired_of(found, row["label"])
    detail = "the row is a conversation that nobody judged: give `label` beside `completion`, or pairs"
    raise RowError("other kind of row", f"{detail}; loss=sft trains on such rows")


def parse_conversation(row: Any, schema: str = "auto") -> ConversationRow:
    """As :func:`parse_row`, for losses that imitate (SFT): a pair is the conversation of its chosen answer.

    What stands in the rejected answer of a pair does not matter.

    Raises:
        RowError: the row cannot be used, or is an answer with a label.
    """
    found = _parsed(row, schema, chosen_alone=True)
    if isinstance(found, UnpairedRow):
        raise RowError(
            "other kind of row",
            "the row is an answer with a label; for loss=sft keep the good answers and hide the label with "
            "columns={label: null}",
        )
    return conversation_of(found) if isinstance(found, PreferenceRow) else found


def parse_taken(row: Any, schema: str, takes: Sequence[str]) -> Row:
    """As :func:`parse_row`, for a loss that takes these kinds of rows.

    Args:
        row: as for :func:`parse_row`.
        schema: as `data.train.schema`.
        takes: `pairs`, and beside them perhaps `conversations`, `labels` or both.

    Raises:
        RowError: the row cannot be used, or is of another kind.
    """
    if {"labels", "conversations"} <= set(takes):
        return parse_row(row, schema)
    if "labels" in takes:
        return parse_judged(row, schema)
    if "conversations" not in takes:
        return parse_preference(row, schema)
    found = parse_row(row, schema)
    return parse_conversation(row, schema) if isinstance(found, UnpairedRow) else found


def conversation_of(pair: PreferenceRow) -> ConversationRow:
    """A pair's prompt with its chosen answer."""
    return ConversationRow([*pair.prompt, pair.chosen_message], len(pair.prompt), pair.inputs, pair.columns, pair.notes)


def _parsed(row: Any, schema: str, *, chosen_alone: bool) -> Row:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, Mapping):
        raise RowError("not an object", f"the row is {kind(row)}, not an object with fields")
    try:
        return _of_known_layout(row, schema, chosen_alone)
    except RowError as error:
        line = guessed_line(row) if error.reason in ("missing field", "unknown layout") else None
        if line is None:
            raise
        raise RowError(error.reason, f"{error.detail}; {line}") from None


def _of_known_layout(row: Mapping[str, Any], schema: str, chosen_alone: bool) -> Row:
    found = detect_schema(row) if schema == "auto" else schema
    parsed: Row
    if found == "unknown":
        raise RowError("unknown layout", f"the row is of no known layout (fields: {shown(list(row))})")
    if found == "pair" or found in PAIR_SCHEMAS:
        if chosen_alone and row.get("chosen") is not None:
            row = {**row, "rejected": row["chosen"]}
        parsed, used = parse_pair(row, schema)
    else:
        parsed, used = _PARSERS[found](row)
    whole = _with_columns(parsed, row, used)
    return checked_pair(whole, chosen_alone=chosen_alone) if isinstance(whole, PreferenceRow) else whole


def _completion(row: Mapping[str, Any]) -> tuple[Row, set[str]]:
    return parse_unpaired(row) if is_label(row.get("label")) else parse_completion(row)


_PARSERS: dict[str, Callable[[Mapping[str, Any]], tuple[Row, set[str]]]] = {
    "completion": _completion,
    "conversation": parse_conversation_row,
    "instruction": parse_instruction,
    "ranked": parse_ranked,
}


def _with_columns(parsed: Row, row: Mapping[str, Any], used: set[str]) -> Row:
    """The row with what its other columns say."""
    of_own_pairs = ABOUT_OWN_PAIRS if row.keys() >= set(ABOUT_OWN_PAIRS) else ()
    known = used.union(IN_EVERY_LAYOUT, of_own_pairs)
    unused = [str(name) for name, value in row.items() if name not in known and not _is_empty(value)]
    unused = sorted(unused, key=lambda name: (name not in MEANINGFUL_COLUMNS, name))[:_MOST_COLUMNS]
    columns, inputs = tuple(map(label, unused)), row_inputs(row)
    if not isinstance(parsed, ConversationRow):
        return replace(parsed, prompt=_with_front(parsed.prompt, row), inputs=inputs, columns=columns)
    messages = _with_front(parsed.messages, row)
    added = len(messages) - len(parsed.messages)
    prompt = parsed.prompt_messages + added if parsed.prompt_messages else 0
    return replace(parsed, messages=messages, prompt_messages=prompt, inputs=inputs, columns=columns)


def _with_front(messages: list[Message], row: Mapping[str, Any]) -> list[Message]:
    """What the columns `system` and `history` say, and the messages behind it."""
    return _with_system(_with_history(messages, row), row)


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
