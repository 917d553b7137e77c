"""What of a row a chat template does not render: it is compared with what the template makes of the row without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from nemo_lmpo.data.messages import METADATA, Inputs, Message, RowError, label, text_of
from nemo_lmpo.data.render import TemplateRefusal, TemplateRenderer
from nemo_lmpo.data.schema import MEANINGFUL_COLUMNS, ConversationRow, PreferenceRow, Row

THOUGHTS = "thoughts of earlier answers"


def given_fields(messages: Sequence[Message]) -> set[str]:
    """Fields that say something in some message, beside role and text."""
    return {
        name
        for message in messages
        for name, value in message.items()
        if name not in ("role", "content")
        and name not in METADATA
        and value not in ("", [], {})
        and not (name == "name" and message["role"] == "tool")  # calls and results stand in order
    }


def refuse_empty_answers(row: PreferenceRow, lost: Sequence[str]) -> None:
    """Refuse a pair of which the template renders nothing of an answer.

    Raises:
        RowError: an answer has no text, and none of its fields is rendered.
    """
    for name, message in (("chosen", row.chosen_message), ("rejected", row.rejected_message)):
        fields = [f"`{label(field)}`" for field in sorted(given_fields([message]))]
        if not text_of(message).strip() and all(field in lost for field in fields):
            detail = (
                f"the chat template renders nothing of the {name} answer, which has {', '.join(fields)} and no text"
            )
            raise RowError("empty response", detail)


def unused_columns(row: Row) -> tuple[str, ...]:
    """Columns that would mean something to a model, and that nothing here uses."""
    return tuple(f"the column `{name}`" for name in row.columns if name in MEANINGFUL_COLUMNS)


@dataclass(frozen=True)
class UnusedFields:
    """Finds what a template leaves out of rows."""

    render: TemplateRenderer

    @cached_property
    def _variables(self) -> frozenset[str]:
        """Variables that the template reads."""
        return self.render.variables()

    def of(self, messages: list[Message], row: PreferenceRow, texts: Sequence[str]) -> tuple[str, ...]:
        """Names of what the template left out.

        Args:
            messages: the prompt as it was rendered.
            row: the row.
            texts: the prompt's generation prompt and both finished conversations.
        """
        conversations = [[*messages, row.chosen_message], [*messages, row.rejected_message]]
        lost = self._beside_texts(conversations, row.inputs, texts[1:])
        lost |= {said for message in messages if (said := _left_out(message, texts[0])) is not None}
        return (*sorted(lost), *unused_columns(row))

    def of_conversation(self, messages: list[Message], row: ConversationRow, text: str) -> tuple[str, ...]:
        """Names of what the template left out of a conversation.

        Args:
            messages: the conversation as it was rendered.
            row: the row.
            text: what the template made of it.
        """
        lost = self._beside_texts([messages], row.inputs, [text])
        lost |= {said for message in messages if (said := _left_out(message, text)) is not None}
        return (*sorted(lost), *unused_columns(row))

    def _beside_texts(self, conversations: list[list[Message]], inputs: Inputs, texts: Sequence[str]) -> set[str]:
        """What is left out of template variables, tools and fields of messages."""
        lost = {f"`chat_template_kwargs.{label(name)}`" for name in inputs.options if name not in self._variables}
        if inputs.tools and self._same(conversations, replace(inputs, tools=None), texts):
            lost.add("`tools`")
        for name in given_fields([message for whole in conversations for message in whole]):
            lost |= self._field(name, conversations, inputs, texts)
        return lost

    def _field(self, name: str, conversations: list[list[Message]], inputs: Inputs, texts: Sequence[str]) -> set[str]:
        without = [[_without(message, name) for message in whole] for whole in conversations]
        if self._same(without, inputs, texts):
            return {f"`{label(name)}`"}
        values = [
            (str(message[name]).strip(), text)
            for whole, text in zip(conversations, texts, strict=True)
            for message in whole
            if isinstance(message.get(name), str)
        ]
        return set() if all(value in text for value, text in values) else {f"`{label(name)}` of some messages"}

    def _same(self, conversations: list[list[Message]], inputs: Inputs, texts: Sequence[str]) -> bool:
        """Whether conversations are rendered as ``texts``; one that the template refuses is not."""
        try:
            return self.render(conversations, inputs) == list(texts)
        except TemplateRefusal:
            return False


def _without(message: Message, name: str) -> Message:
    kept = {key: value for key, value in message.items() if key != name}
    return kept if "content" in kept else {**kept, "content": ""}


def _left_out(message: Mapping[str, object], prompt: str) -> str | None:
    """What of a message's text does not stand in the rendered prompt."""
    said = text_of(dict(message)).strip()
    if said in prompt:
        return None
    answer = said.rsplit("</think>", 1)[-1].strip()
    if message["role"] == "assistant" and answer != said and answer in prompt:
        return THOUGHTS
    letters = "".join(filter(str.isalnum, said))
    if letters in "".join(filter(str.isalnum, prompt)):
        return None
    return f"text of `{message['role']}` messages"
