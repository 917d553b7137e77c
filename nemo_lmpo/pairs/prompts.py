"""The prompts that answers are sampled for: read from any source that training reads, each once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_lmpo.config.row_fields import IN_EVERY_LAYOUT
from nemo_lmpo.data.messages import Inputs, Message, RowError, text_of
from nemo_lmpo.data.raw import RawRow
from nemo_lmpo.data.read import Source, open_source
from nemo_lmpo.data.rows.parse import parse_preference, parse_row
from nemo_lmpo.data.rows.prompts import messages_of, prompt_messages
from nemo_lmpo.data.schema import ConversationRow
from nemo_lmpo.errors import DataError, shown
from nemo_lmpo.pairs.candidate import AskedPrompt
from nemo_lmpo.runtime.files import content_hash

REPEATED = "repeated"
_ID_LETTERS = 24
"""Of a prompt's hash: 96 bits, which do not meet in any set of prompts."""
_STANDINS = {"chosen": "a", "rejected": "b"}
"""Answers for rows that have none: then a prompt is read as that of a pair is."""


@dataclass(frozen=True)
class AskedPrompts:
    """The prompts of a source."""

    prompts: list[AskedPrompt]
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows by why they give no prompt."""

    @property
    def sha256(self) -> str:
        """Changes whenever a prompt or their order does."""
        return content_hash([prompt.id for prompt in self.prompts])


def read_source(path: str, split: str, name: str | None, limit: int | None, *, skip_bad: bool) -> AskedPrompts:
    """Distinct prompts in the order of the source.

    Rows may be prompts, or pairs in any layout that training takes, whose answers are not used.

    Args:
        path: as `data.train.path`.
        split: of hub datasets and builtin tasks.
        name: of the column that holds the prompt, where training does not know it.
        limit: the first so many distinct prompts.
        skip_bad: leave out and count rows that hold no usable prompt.

    Raises:
        DataError: no source, or a row without a usable prompt; names it.
    """
    source = open_source(path, split)
    found: dict[str, AskedPrompt] = {}
    left_out: Counter[str] = Counter()
    for row, prompt in _prompts(source, name):
        if isinstance(prompt, RowError):
            if not skip_bad:
                raise DataError(
                    f"--prompts {source.location(row.number)}: {prompt.detail}; correct it, name the column with "
                    "--prompt-field, or leave such rows out with --skip-bad-rows"
                )
            left_out[prompt.reason] += 1
        elif prompt.id in found:
            left_out[REPEATED] += 1
        elif limit is None or len(found) < limit:
            found[prompt.id] = prompt
        else:
            break
    if not found:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "it is empty"
        raise DataError(f"--prompts {shown(path)} gives no prompt ({reasons}); give a source with prompts")
    return AskedPrompts(list(found.values()), left_out)


def _prompts(source: Source, name: str | None) -> Iterator[tuple[RawRow, AskedPrompt | RowError]]:
    for row in source.read():
        try:
            yield row, asked_prompt(row.value, name)
        except RowError as error:
            yield row, error


def asked_prompt(row: Any, name: str | None = None) -> AskedPrompt:
    """The prompt of a row.

    Args:
        row: a prompt alone, or any row that training takes, whose answers are not used.
        name: of the column that holds the prompt, where it is another one than those that training knows.

    Raises:
        RowError: it has none.
    """
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, Mapping):
        raise RowError("not an object", "the row is not an object with fields")
    messages, inputs = _prompt_alone(row, name) if name is not None else _prompt(row)
    if not any(text_of(message).strip() for message in messages):
        raise RowError("empty prompt", "the prompt has no text")
    tools, options = inputs.tools, dict(inputs.options)
    digest = content_hash([messages, *([tools, options] if tools or options else [])])
    return AskedPrompt(digest[:_ID_LETTERS], messages, inputs, row)


def _prompt(row: Mapping[str, Any]) -> tuple[list[Message], Inputs]:
    """Of a row with answers as training reads it; of one without, or with answers that training refuses, alone."""
    try:
        parsed = parse_row(row)
    except RowError as error:
        try:
            return _prompt_alone(row, None)
        except RowError as alone:
            # What is wrong with a row of answers says more than that its prompt cannot be found.
            raise (alone if error.reason == "unknown layout" else error) from None
    if not isinstance(parsed, ConversationRow):
        return parsed.prompt, parsed.inputs
    messages = parsed.messages[: parsed.prompt_messages or None]
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return checked_prompt(messages), parsed.inputs


def checked_prompt(messages: list[Message]) -> list[Message]:
    """The messages, if an answer can follow them.

    Raises:
        RowError: the last one is not the user's.
    """
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise RowError("wrong last role", "the prompt does not end with a message of the user")
    return messages


def _prompt_alone(row: Mapping[str, Any], name: str | None) -> tuple[list[Message], Inputs]:
    if name is not None and row.get(name) is None:
        raise RowError("missing field", f"the field '{name}' is missing (fields: {shown(list(row))})")
    messages = prompt_messages(row)[0] if name is None else messages_of(row[name], name)
    beside = {key: row[key] for key in IN_EVERY_LAYOUT if key in row}
    parsed = parse_preference({**beside, "prompt": messages, **_STANDINS})
    return parsed.prompt, parsed.inputs


def readable_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON holds it, for hashes."""
    found: dict[str, Any] = json.loads(json.dumps(row, default=str, sort_keys=True))
    return found
