"""The prompts that answers are sampled for: read from any source that training reads, each once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_lmpo.data.messages import RowError, is_list, structured
from nemo_lmpo.data.read import RawRow, Source, open_source
from nemo_lmpo.data.schema import PreferenceRow, parse_row
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


def read_source(path: str, split: str, name: str, limit: int | None, *, skip_bad: bool) -> AskedPrompts:
    """Distinct prompts in the order of the source.

    Rows may be prompts, or pairs in any layout that training takes, whose answers are not used.

    Args:
        path: as `data.train.path`.
        split: of hub datasets and builtin tasks.
        name: of the column that holds the prompt.
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


def _prompts(source: Source, name: str) -> Iterator[tuple[RawRow, AskedPrompt | RowError]]:
    for row in source.read():
        try:
            yield row, asked_prompt(row.value, name)
        except RowError as error:
            yield row, error


def asked_prompt(row: Any, name: str = "prompt") -> AskedPrompt:
    """The prompt of a row.

    Raises:
        RowError: it has none.
    """
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, Mapping):
        raise RowError("not an object", "the row is not an object with fields")
    parsed = _parsed(row, name)
    tools, options = parsed.inputs.tools, dict(parsed.inputs.options)
    digest = content_hash([parsed.prompt, *([tools, options] if tools or options else [])])
    return AskedPrompt(digest[:_ID_LETTERS], parsed.prompt, parsed.inputs, row)


def _parsed(row: Mapping[str, Any], name: str) -> PreferenceRow:
    given = row.get(name)
    if name == "prompt":
        if row.get("chosen") is not None and row.get("rejected") is not None:
            try:
                return parse_row(row)
            except RowError:
                if given is None:  # a pair that cannot be used may still have a prompt
                    raise
        if given is None and row.get("messages") is not None:
            given = _up_to_the_answer(structured(row["messages"], "messages"))
    if given is None:
        raise RowError("missing field", f"the field '{name}' is missing (fields: {shown(list(row))})")
    others = {key: value for key, value in row.items() if key not in (name, "messages", "completion", "response")}
    parsed = parse_row({**others, "prompt": given, **_STANDINS})
    if not any(str(message.get("content", "")).strip() for message in parsed.prompt):
        raise RowError("empty prompt", "the prompt has no text")
    return parsed


def _up_to_the_answer(messages: Any) -> Any:
    """A conversation without the answer that ends it."""
    if not is_list(messages):
        return messages
    kept = list(messages)
    if kept and isinstance(kept[-1], Mapping) and kept[-1].get("role") == "assistant":
        kept.pop()
    return kept


def readable_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON holds it, for hashes."""
    found: dict[str, Any] = json.loads(json.dumps(row, default=str, sort_keys=True))
    return found
