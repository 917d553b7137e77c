"""What a row of no known layout could be: the line that would map its columns, guessed from their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nemo_lmpo.config.row_fields import ANSWER_LISTS, CONVERSATION_FIELDS, ROW_FIELDS
from nemo_lmpo.data.messages import is_list, is_message

_PROMPTS = ("prompt", "question", "instruction", "query", "problem", "input", "user", "human", "request", "context")
_BETTER = {*("chosen", "best", "better", "winner", "win", "won", "preferred", "accepted", "good", "positive", "pos")}
_WORSE = {*("rejected", "worst", "worse", "loser", "lose", "lost", "dispreferred", "refused", "bad", "negative", "neg")}
_ANSWERS = {
    *("answer", "response", "completion", "output", "solution", "reply", "generation", "target", "assistant"),
    *("answers", "responses", "completions", "outputs", "generations", "candidates"),
}
_VERDICTS = {*("preference", "winner", "win", "preferred", "better", "best", "chosen", "choice", "label", "verdict")}
"""Words of a column that says which of two answers is better."""
_SCORES = {"score", "scores", "rating", "ratings", "reward", "rewards"}
_RANKS = {"rank", "ranks", "ranking", "rankings"}
_SYSTEMS = ("system_prompt", "system_message")
_FIRST_AND_SECOND = (("a", "b"), ("1", "2"), ("0", "1"), ("one", "two"), ("first", "second"), ("j", "k"))
_WORDS = re.compile(r"[a-z]+|\d+")
_PLAIN = re.compile(r"[\w.-]+")
_LONGEST_NAME = 40

_Fields = Mapping[str, Any]
_Guess = tuple[dict[str, str], str]
"""Columns by field, and what the row would be with them."""


def guessed_line(row: Mapping[str, Any]) -> str | None:
    """The setting that would make a row of a known layout, and of which kind it then is; None if nothing fits.

    >>> guessed_line({"question": "Q", "best": "a", "worst": "b"})
    'data.train.columns={prompt: question, chosen: best, rejected: worst} would make it a pair'
    """
    fields = dict(_fields(row))
    for guess in (_pair, _ranked, _conversation, _answered):
        found = guess(fields)
        if found is None:
            continue
        columns, kind = found
        columns = {field: column for field, column in columns.items() if field != column}
        system = next((name for name in _SYSTEMS if isinstance(fields.get(name), str) and fields[name].strip()), None)
        if system and "system" not in fields:
            columns["system"] = system
        if columns:
            return f"data.train.columns={_written(columns)} would make it {kind}"
    return None


def _fields(row: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Columns that say something, and fields of those that are objects, as paths."""
    for name, value in row.items():
        if not isinstance(name, str) or value is None or not name.isprintable() or len(name) > _LONGEST_NAME:
            continue
        yield name, value
        if isinstance(value, Mapping) and not is_message(value):
            yield from (
                (f"{name}.{inner}", item)
                for inner, item in value.items()
                if isinstance(inner, str) and item is not None and inner.isprintable() and len(inner) <= _LONGEST_NAME
            )


def _written(columns: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{field}: {_name(column)}" for field, column in columns.items()) + "}"


def _name(column: str) -> str:
    return column if _PLAIN.fullmatch(column) else '"' + column.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _words(name: str) -> set[str]:
    """`responseChosen`, `response_chosen` and `data.response-chosen` alike."""
    return set(_WORDS.findall(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.rpartition(".")[2]).lower()))


def _is_said(value: Any) -> bool:
    """A text, a message or messages."""
    if isinstance(value, str) or is_message(value):
        return True
    return is_list(value) and len(value) > 0 and all(map(is_message, value))


def _named(fields: _Fields, words: set[str], fits: Callable[[Any], bool]) -> str | None:
    """The first field of which a word is one of these; a field of exactly that name before others."""
    exact = next((name for name in fields if name in words and fits(fields[name])), None)
    return exact or next((name for name in fields if _words(name) & words and fits(fields[name])), None)


def _prompt(fields: _Fields) -> str | None:
    for wanted in _PROMPTS:
        name = next((name for name in fields if name.rpartition(".")[2].lower() == wanted), None)
        if name is not None and _is_said(fields[name]):
            return name
    others = (name for name in fields if _words(name) & set(_PROMPTS) and not _words(name) & {"id", "system"})
    return next((name for name in others if _is_said(fields[name])), None)


def _pair(fields: _Fields) -> _Guess | None:
    chosen, rejected = (_named(fields, words, _is_said) for words in (_BETTER, _WORSE))
    kind = "a pair"
    if chosen is None or rejected is None:
        chosen, rejected = _two_alike(fields)
        kind = f"a pair, if `{chosen}` is the better answer{_verdict(fields)}"
    if chosen is None or rejected is None:
        return None
    prompt = _prompt({name: value for name, value in fields.items() if name not in (chosen, rejected)})
    both = {"chosen": chosen, "rejected": rejected}
    if prompt is None and isinstance(fields[chosen], str):
        return None
    return ({"prompt": prompt, **both} if prompt is not None else both), kind


def _verdict(fields: _Fields) -> str:
    """What to do where another column says which of two answers is better, row by row."""
    names = (name for name, value in fields.items() if isinstance(value, int | float | str))
    name = next((name for name in names if _words(name) & _VERDICTS), None)
    return "" if name is None else f" in every row; where `{name}` says it, write `chosen` and `rejected` by it"


def _two_alike(fields: _Fields) -> tuple[str | None, str | None]:
    """Two conversations, or else texts, whose names differ in `a` and `b`, or `1` and `2`."""
    for name in sorted(fields, key=lambda name: isinstance(fields[name], str)):
        for first, second in _FIRST_AND_SECOND:
            apart = r"\d" if first.isdecimal() else r"[a-z\d]"  # `response1`, but not the `a` of `response_at`
            wanted = re.sub(f"(?<!{apart}){first}(?!{apart})", second, name, flags=re.IGNORECASE).lower()
            other = next((known for known in fields if known.lower() == wanted and known != name), None)
            if other is not None and _is_said(fields[name]) and _is_said(fields[other]):
                return name, other
    return None, None


def _ranked(fields: _Fields) -> _Guess | None:
    answers = _named(fields, {*_ANSWERS, *ANSWER_LISTS}, lambda value: is_list(value) and len(value) > 1)
    if answers is None:
        return None
    count = len(fields[answers])
    numbers = {
        field: _named(fields, words, lambda value: is_list(value) and len(value) == count)
        for field, words in (("scores", _SCORES), ("ranks", _RANKS))
    }
    scores = {field: name for field, name in numbers.items() if name is not None}
    prompt = _prompt(fields)
    if prompt is None or not scores:
        return None
    return {"prompt": prompt, "responses": answers, **scores}, "a pair of the best and the worst answer"


def _conversation(fields: _Fields) -> _Guess | None:
    for name, value in fields.items():
        if name not in CONVERSATION_FIELDS and is_list(value) and len(value) > 1 and all(map(is_message, value)):
            return {"messages": name}, "a conversation"
    return None


def _answered(fields: _Fields) -> _Guess | None:
    free = {name: value for name, value in fields.items() if name not in ROW_FIELDS or name in ("completion", "output")}
    answer = _named(free, _ANSWERS, _is_said)
    prompt = _prompt({name: value for name, value in fields.items() if name != answer})
    if answer is None or prompt is None:
        return None
    more = "context" if "context" in fields and prompt == "instruction" and isinstance(fields["context"], str) else None
    if more is not None:
        return {"instruction": prompt, "input": more, "output": answer}, "a conversation"
    return {"prompt": prompt, "completion": answer}, "a conversation"
