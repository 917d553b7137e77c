"""Rows in the forms that everything behind the reader knows: a pair, a conversation, an answer with a label."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_lmpo.data.messages import PLAIN_INPUTS, Inputs, Message, fields_of, text_of

MEANINGFUL_COLUMNS = {
    *("image", "images", "video", "videos", "audio", "audios", "documents", "functions", "system_prompt", "context"),
    "input",
}
"""Columns that nothing here uses, though they would mean something to a model."""


@dataclass(frozen=True)
class PreferenceRow:
    """A prompt with a preferred and a rejected answer."""

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
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What there is to say of how the row became a pair."""

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


@dataclass(frozen=True)
class ConversationRow:
    """A conversation to imitate."""

    messages: list[Message]
    """Whole messages as the row has them, one of the assistant's at least; the last may be anybody's."""
    prompt_messages: int = 0
    """So many at the start are only the prompt of what follows: the row has prompt and answer apart."""
    inputs: Inputs = PLAIN_INPUTS
    """What the chat template gets beside the messages."""
    columns: tuple[str, ...] = field(default=(), compare=False)
    """Columns of the row that nothing uses."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What there is to say of how the row became a conversation."""


@dataclass(frozen=True)
class UnpairedRow:
    """A prompt with one answer, which is good or bad."""

    prompt: list[Message]
    """Whole messages; the last is the user's, or a tool's."""
    answer: Message
    """The assistant's message, with all that it has."""
    label: bool
    """Whether the answer is a good one."""
    inputs: Inputs = PLAIN_INPUTS
    """What the chat template gets beside the messages."""
    columns: tuple[str, ...] = field(default=(), compare=False)
    """Columns of the row that nothing uses."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What there is to say of how the row was read."""

    def as_pair(self) -> PreferenceRow:
        """A pair whose answers are both this one, to be laid as answers of pairs are."""
        fields = fields_of(self.answer)
        said = text_of(self.answer)
        return PreferenceRow(self.prompt, said, said, fields, fields, self.inputs, self.columns, self.notes)


Row = PreferenceRow | ConversationRow | UnpairedRow
