"""Messages and what else a chat template takes: whole, checked, and made of plain values only."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_lmpo.errors import shown

ROLES = ("system", "developer", "user", "assistant", "tool")
_ROLES_OF_SHAREGPT = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "ai"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
"""Roles by what ShareGPT's `from` calls them."""
METADATA = {
    *("id", "tool_call_id", "index", "timestamp", "date", "created", "score", "rating", "source", "model", "language"),
    "tokens",
}
"""Fields of messages that say nothing to a model; templates may leave them out."""

_LONGEST_LABEL = 40

Message = dict[str, Any]
"""`role`, `content`, and whatever else the row has of it."""

_ARGUMENTS = {
    *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "sanitize_control_tokens", "tokenizer_kwargs"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
}
"""What `apply_chat_template` takes beside a template's variables."""
_STRUCTURED = re.compile(r"""\s*(?:\[\s*)?\{\s*(["'])(?:role|content|from|value|tool_calls|name)\1\s*:""")


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


def kind(value: Any) -> str:
    """What a value is, for messages."""
    return "null" if value is None else f"of type {type(value).__name__}"


def label(name: str) -> str:
    """A field's name as messages show it."""
    return name if name.isprintable() and len(name) <= _LONGEST_LABEL else shown(name, _LONGEST_LABEL)


def text(value: Any, where: str) -> str:
    """A text that is valid Unicode.

    Raises:
        RowError: it is not; ``where`` names it.
    """
    if not isinstance(value, str):
        raise RowError("not text", f"{where} is {kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError("not text", f"{where} holds half a surrogate pair, which is not a character") from None
    return value


def is_list(value: Any) -> bool:
    """A list as JSON, `datasets` and Parquet (numpy arrays) give it."""
    if type(value) in (list, str, dict):  # nearly all: checks of abstract classes take many times longer
        return type(value) is list
    return not isinstance(value, str | bytes | Mapping) and (isinstance(value, Sequence) or hasattr(value, "tolist"))


def plain(value: Any, where: str) -> Any:
    """The same value made of lists, objects, texts, numbers and nulls, as a template may see it.

    Raises:
        RowError: it holds bytes, invalid text, or is nested too deeply.
    """
    try:
        return _plain(value, where)
    except RecursionError:
        raise RowError("not text", f"{where} is nested too deeply") from None


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return text(value, f"a text in {where}")
    if isinstance(value, Mapping):
        return {text(name, f"a name in {where}"): _plain(item, where) for name, item in value.items()}
    if is_list(value) or isinstance(value, set):
        return [_plain(item, where) for item in value]
    if isinstance(value, bytes):
        raise RowError("not text", f"{where} holds bytes, not text")
    return text(str(value), where)  # dates


def is_message(value: Any) -> bool:
    """Whether a value is a message: `role` with whatever it has, or ShareGPT's `from` and `value`."""
    return isinstance(value, Mapping) and ("role" in value or ("from" in value and "value" in value))


def message_list(value: Any, name: str) -> list[Message]:
    """A message, or a list of messages, as a list.

    Raises:
        RowError: it is neither.
    """
    return whole_messages([value] if is_message(value) else value, name)


def whole_messages(value: Any, name: str) -> list[Message]:
    """A list of messages with all that they have, fields that are null left out.

    Raises:
        RowError: it is not such a list.
    """
    messages = [one_message(message, f"message {number} of '{name}'") for number, message in enumerate(value, start=1)]
    if not messages:
        raise RowError("missing field", f"'{name}' is an empty list")
    return messages


def one_message(message: Any, where: str) -> Message:
    """A message with all that it has.

    Raises:
        RowError: it has no known role, or no text where it needs one.
    """
    if isinstance(message, Mapping) and message.get("role") is None and message.get("from") is not None:
        message = _of_sharegpt(message, where)
    if not isinstance(message, Mapping) or message.get("role") is None:
        raise RowError("missing field", f"{where} is not an object with 'role' and 'content'")
    role = message["role"]
    if role not in ROLES:
        raise RowError("unknown role", f"{where} has the role {shown(role)}; known: {', '.join(ROLES)}")
    more = {
        text(name, f"a field's name of {where}"): plain(value, f"the field {shown(name)} of {where}")
        for name, value in message.items()
        if value is not None and name not in ("role", "content")
    }
    content = message.get("content")
    if content is None and role == "assistant" and any(name not in METADATA for name in more):
        return {"role": role, **more}  # a call of tools needs no text
    return {"role": role, "content": _content(content, f"the content of {where}"), **more}


def _of_sharegpt(message: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """ShareGPT's `from` and `value` as `role` and `content`."""
    speaker = message["from"]
    role = _ROLES_OF_SHAREGPT.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(_ROLES_OF_SHAREGPT)
        raise RowError("unknown role", f"{where} is from {shown(speaker)}; known: {known}")
    more = {name: value for name, value in message.items() if name not in ("from", "value", "role", "content")}
    return {"role": role, "content": message.get("value"), **more}


def _content(value: Any, where: str) -> str:
    """A message's text; of a content in parts, the texts behind one another."""
    if not is_list(value):
        return text(value, where)
    parts = []
    for part in value:
        if isinstance(part, Mapping) and part.get("type", "text") == "text" and "text" in part:
            parts.append(text(part["text"], f"a part of {where}"))
        else:
            found = part.get("type") if isinstance(part, Mapping) else part
            raise RowError("not text", f"{where} has a part {shown(found)}; only parts of type 'text' can be trained")
    return "".join(parts)


def fields_of(message: Message) -> Message:
    """What a message has beside role and text."""
    return {name: value for name, value in message.items() if name not in ("role", "content")}


def text_of(message: Message) -> str:
    """A message's text; empty if it has none."""
    return str(message.get("content", ""))


def structured(value: Any, name: str) -> Any:
    """A text that is a list of messages, or one, as JSON or as Python writes it: that list; else the value as it is.

    Tables hold conversations so, as all their cells are texts.

    Raises:
        RowError: it looks so, but cannot be read.
    """
    if not isinstance(value, str) or not _STRUCTURED.match(value):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise RowError(
            "broken messages",
            f"the field '{name}' looks like messages, but is neither JSON nor a Python list; write it as JSON, "
            "or set the schema to strings to train it as text",
        ) from None


def row_inputs(row: Mapping[str, Any]) -> Inputs:
    """A row's `tools` and `chat_template_kwargs`, also where they are JSON texts.

    Raises:
        RowError: they are not a list and an object.
    """
    tools, options = (_from_json(row.get(name), name) for name in ("tools", "chat_template_kwargs"))
    if is_list(tools):
        tools = [_from_json(plain(tool, "'tools'"), "tools") for tool in tools]
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError("not tools", f"the field 'tools' is not a list of objects: {shown(tools)}")
    if options and not isinstance(options, Mapping):
        raise RowError("not template variables", f"'chat_template_kwargs' is not an object: {shown(options)}")
    options = {
        name: value for name, value in plain(options or {}, "'chat_template_kwargs'").items() if value is not None
    }
    for name in options:
        if name in _ARGUMENTS or not name.isidentifier():
            raise RowError("not template variables", f"'chat_template_kwargs' cannot set {shown(name)}")
    return Inputs(tools or None, options) if tools or options else PLAIN_INPUTS


def _from_json(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise RowError("broken JSON", f"the text of '{name}' is not JSON: {shown(value)}") from None


def all_texts(value: Any) -> Iterator[str]:
    """Every text in a value, names of fields left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict) or isinstance(value, Mapping):  # noqa: SIM101 (the second takes far longer)
        for item in value.values():
            yield from all_texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from all_texts(item)


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every text changed, names of fields left as they are."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: with_texts(item, change) for name, item in value.items()}
    return [with_texts(item, change) for item in value] if isinstance(value, list) else value
