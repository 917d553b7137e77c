"""What OpenAI-compatible servers answer, as typed values.

Nothing else of the package looks into a server's JSON: what has another form than it should is refused here, by its
place and value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from nemo_lmpo.errors import shown

NOT_SAID = "not said"
"""Stands for the name of a model that a server does not name."""
_REFUSAL_CODES = frozenset(
    (
        "content_filter",
        "content_policy_violation",
        "responsibleaipolicyviolation",
        "invalid_prompt",
        "moderation_blocked",
    )
)
"""Error codes of services that do not answer a prompt because of what it says."""
_MAX_NAME = 200
Kind = TypeVar("Kind")


class ReplyError(Exception):
    """A reply has not the form that it should have; the message is a clause without a subject."""


@dataclass(frozen=True)
class Completion:
    """Of `/v1/completions`."""

    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass(frozen=True)
class TopToken:
    """A likely token."""

    token: str
    logprob: float


@dataclass(frozen=True)
class ChatReply:
    """Of `/v1/chat/completions`."""

    text: str | None
    """None: it said nothing."""
    refusal: str | None
    """Why it does not answer, where it says so."""
    finish_reason: str | None
    model: str
    top_tokens: tuple[TopToken, ...]
    """The most likely first tokens; empty where they were not asked for or not sent."""


@dataclass(frozen=True)
class ServerError:
    """Of a status that is not a success."""

    message: str
    code: str
    param: str
    """Of the request, which is at fault."""

    @property
    def refusal(self) -> bool:
        """Whether the server declines this prompt because of what it says."""
        return self.code.lower() in _REFUSAL_CODES


def decode(content: bytes) -> Any:
    """JSON of a reply; UTF-8, whatever its header says.

    Raises:
        ReplyError: it is not JSON.
    """
    try:
        return json.loads(content.decode("utf-8-sig"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise ReplyError("answers with something that is not UTF-8 text") from None
    except RecursionError:
        raise ReplyError("answers with JSON that is nested too deeply") from None
    except ValueError:
        start = content[:60].decode("utf-8", errors="replace")
        raise ReplyError(f"answers with something that is not JSON ({shown(start)})") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def parse_models(content: Any) -> list[str]:
    """Names of `/v1/models`; empty where it says none."""
    listed = content.get("data") if isinstance(content, Mapping) else None
    models = listed if isinstance(listed, list) else []
    names = [model.get("id") for model in models if isinstance(model, Mapping)]
    return [text(name) for name in names if isinstance(name, str) and name]


def parse_completion(content: Any) -> Completion:
    """The first choice.

    Raises:
        ReplyError: names the field.
    """
    choice = _first_choice(content)
    return Completion(
        text(_field(choice, "choices[0]", "text", str)),
        _optional(choice, "choices[0]", "finish_reason", str),
        *_usage(content),
    )


def parse_chat(content: Any) -> ChatReply:
    """The first choice.

    Raises:
        ReplyError: names the field.
    """
    choice = _first_choice(content)
    finish = _optional(choice, "choices[0]", "finish_reason", str)
    message = _field(choice, "choices[0]", "message", dict)
    said, declined = _message_text(message)
    refusal = declined or _optional(message, "choices[0].message", "refusal", str) or None
    if refusal is None and finish == "content_filter":
        refusal = "content_filter"
    name = content.get("model")
    model = text(name)[:_MAX_NAME] if isinstance(name, str) and name else NOT_SAID
    return ChatReply(said, refusal, finish, model, _top_tokens(choice))


def check_echo(content: Any, prompts: Sequence[Sequence[int]]) -> None:
    """Whether an answer to echoed prompts has the log-probability of each of their tokens.

    Args:
        content: the reply.
        prompts: token ids that were sent.

    Raises:
        ReplyError: names the field.
    """
    choices = _field(_object(content, "the reply"), "the reply", "choices", list)
    if len(choices) != len(prompts):
        raise ReplyError(f"answers {len(prompts)} prompts with {len(choices)} choices")
    for place, (choice, prompt) in enumerate(zip(choices, prompts, strict=True)):
        name = f"choices[{place}]"
        logprobs = _field(_object(choice, name), name, "logprobs", dict)
        for field, fits in (("token_logprobs", _is_logprob), ("top_logprobs", _are_logprobs)):
            found = _field(logprobs, f"{name}.logprobs", field, list)
            if len(found) < len(prompt):
                raise ReplyError(f"answers with {len(found)} {field} for an echoed prompt of {len(prompt)} tokens")
            # Nothing comes before the first token.
            wrong = [value for value in found[1 : len(prompt)] if not fits(value)]
            if wrong:
                raise ReplyError(f"answers with {name}.logprobs.{field} that hold {shown(wrong[0])}")


def _is_logprob(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value <= 1e-3


def _are_logprobs(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(map(_is_logprob, value.values()))


def check_texts(content: Any, count: int) -> None:
    """Whether a reply has one text per prompt.

    Raises:
        ReplyError: names the field.
    """
    choices = _field(_object(content, "the reply"), "the reply", "choices", list)
    if len(choices) != count:
        raise ReplyError(f"answers {count} prompts with {len(choices)} choices")
    for place, choice in enumerate(choices):
        _field(_object(choice, f"choices[{place}]"), f"choices[{place}]", "text", str)
        _field(choice, f"choices[{place}]", "index", int)


def parse_error(content: bytes) -> ServerError:
    """What a server says of its error, in whatever form; never raises."""
    try:
        found = decode(content)
    except ReplyError:
        return ServerError(_one_line(content.decode("utf-8", errors="replace")), "", "")
    error = found.get("error", found) if isinstance(found, Mapping) else found
    if not isinstance(error, Mapping):
        return ServerError(_one_line(error if isinstance(error, str) else json.dumps(error)), "", "")
    inner = error.get("innererror")
    codes = [error.get("code"), inner.get("code") if isinstance(inner, Mapping) else None, error.get("type")]
    code = next((one for one in codes if isinstance(one, str) and one.lower() in _REFUSAL_CODES), codes[0])
    message = error.get("message", error.get("detail", error))
    return ServerError(
        _one_line(message if isinstance(message, str) else json.dumps(message)),
        code if isinstance(code, str) else "",
        error["param"] if isinstance(error.get("param"), str) else "",
    )


def parse_score(content: Any) -> float:
    """The one number of vLLM's `/pooling` (`data`), `/classify` (`probs`) or `/score` (`score`).

    NaN where the server sends null, which is how JSON writes it. Models that `/pooling` serves with a value for every
    token have the conversation's at the last one.

    Raises:
        ReplyError: there is none, or more than one.
    """
    rows = _field(_object(content, "the reply"), "the reply", "data", list)
    if len(rows) != 1:
        raise ReplyError(f"answers one conversation with {len(rows)} rows of data")
    row = _object(rows[0], "data[0]")
    name = next((name for name in ("score", "probs", "data") if name in row), "score")
    if name not in row:
        raise ReplyError(f"answers with data[0] without a score (fields: {shown(list(row))})")
    value = row[name]
    while isinstance(value, list) and (len(value) == 1 or (value and all(_is_alone(one) for one in value))):
        value = value[-1]  # of a value for every token, that of the last one
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ReplyError(f"answers with data[0].{name} {shown(value)}, which is not one score")
    return float(value)


def _is_alone(value: object) -> bool:
    return isinstance(value, list) and len(value) == 1


def text(value: str) -> str:
    """Text that UTF-8 can hold: half surrogates, which JSON's escapes allow, become U+FFFD."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _one_line(value: str) -> str:
    line = " ".join(text(value).split())
    return "".join(letter if letter.isprintable() else "?" for letter in line)[:300]


def _object(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ReplyError(f"answers with {place} {shown(value)}, which is not an object")
    return value


def _field(parent: Mapping[str, Any], place: str, name: str, kind: type[Kind]) -> Kind:
    value = parent.get(name)
    if not isinstance(value, kind):
        where = name if place == "the reply" else f"{place}.{name}"
        raise ReplyError(f"answers without {where}" if name not in parent else f"answers with {where} {shown(value)}")
    return value


def _optional(parent: Mapping[str, Any], place: str, name: str, kind: type[Kind]) -> Kind | None:
    return None if parent.get(name) is None else _field(parent, place, name, kind)


def _first_choice(content: Any) -> Mapping[str, Any]:
    choices = _field(_object(content, "the reply"), "the reply", "choices", list)
    if not choices:
        raise ReplyError("answers with no choices")
    return _object(choices[0], "choices[0]")


def _usage(content: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Tokens of the prompt and of the completion, where they are counted."""
    usage = _optional(content, "the reply", "usage", dict) or {}
    counts = []
    for name in ("prompt_tokens", "completion_tokens"):
        value = usage.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 10**9):
            raise ReplyError(f"answers with usage.{name} {shown(value)}")
        counts.append(value)
    return counts[0], counts[1]


def _message_text(message: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Text and refusal of a message, whose content is text, nothing, or a list of parts."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return (None if content is None else text(content)), None
    if not isinstance(content, list):
        raise ReplyError(f"answers with choices[0].message.content {shown(content)}")
    texts: list[str] = []
    refusals: list[str] = []
    for place, part in enumerate(content):
        name = f"choices[0].message.content[{place}]"
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = _field(_object(part, name), name, "type", str)
        if kind in ("text", "output_text"):
            texts.append(_field(part, name, "text", str))
        elif kind == "refusal":
            refusals.append(_field(part, name, "refusal", str))
        # Thoughts are not part of the answer: `thinking`, `reasoning`, and others that services name as they like.
    return (text("".join(texts)) if texts else None), ("".join(refusals) or None)


def _top_tokens(choice: Mapping[str, Any]) -> tuple[TopToken, ...]:
    place = "choices[0].logprobs"
    logprobs = _optional(choice, "choices[0]", "logprobs", dict) or {}
    content = _optional(logprobs, place, "content", list)
    if not content:
        return ()
    first = _object(content[0], f"{place}.content[0]")
    found = []
    for number, one in enumerate(_optional(first, f"{place}.content[0]", "top_logprobs", list) or []):
        name = f"{place}.content[0].top_logprobs[{number}]"
        token = _field(_object(one, name), name, "token", str)
        value: Any = one.get("logprob")
        if not _is_logprob(value):
            raise ReplyError(f"answers with {name}.logprob {shown(value)}, which is not a log-probability")
        found.append(TopToken(text(token), float(value)))
    return tuple(found)
