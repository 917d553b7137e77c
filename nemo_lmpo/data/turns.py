"""Conversations as text: which parts of a rendered conversation are the assistant's turns.

A conversation is rendered once, whole. A turn is found from the front: in front of it must stand the generation prompt
of the messages before it, and behind its text the end of turn. Where the template renders earlier turns otherwise than
last ones, a turn is found by texts that stand for any in its place: all around it must stay as it is. A turn whose own
text the whole conversation does not have (a thought that is dropped) is not predicted, and told. Nothing is found by
searching.

A template's own marks (`{% generation %}`) are what is predicted only where that is asked for: authors put them around
headers that belong to the prompt, and behind ends of turn. Elsewhere the marks are compared, and a difference is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_lmpo.data.chat import ChatFormat, with_system
from nemo_lmpo.data.layout import BLANKS_CHANGED, BLANKS_LEFT_OUT, shared_beginning, shared_end
from nemo_lmpo.data.marks import Span, behind, differences
from nemo_lmpo.data.messages import Inputs, Message, RowError, text_of
from nemo_lmpo.data.render import TemplateRefusal
from nemo_lmpo.data.schema import ConversationRow
from nemo_lmpo.data.unused import given_fields
from nemo_lmpo.errors import ConfigError, shown

REWRITTEN = "the chat template rewrites an answer, which is not predicted"
OPEN_ENDED = "the chat template ends earlier answers otherwise than last ones; their ends are not predicted"
MESSAGES_LEFT_OUT = "messages behind the last answer are left out"
OTHER_CONTEXT = "the chat template renders what is before an answer otherwise than for generation"
_PROBES = ("zqprobeqz", "xkmarkerkx")
"""Answers that stand for any: they share neither beginning nor end."""


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation as text, up to the end of its last answer."""

    text: str
    spans: tuple[Span, ...]
    """Start and stop in the text of what is predicted, ends of turn included, in order."""
    notes: tuple[str, ...] = ()
    """What there is to say of how the template lays it."""
    lost: tuple[str, ...] = ()
    """What of the row the template does not render."""


@dataclass(frozen=True)
class _Found:
    """A turn in its conversation's text: where it begins, where its own text ends, and what there is to say."""

    start: int
    stop: int
    note: str | None = None


class ConversationFormat:
    """Renders conversations with a chat template and finds what is predicted in them.

    Args:
        chat: the template with its tokenizer.
        predict: as `data.predict`.

    Raises:
        ConfigError: the template has no marks to predict.
    """

    def __init__(self, chat: ChatFormat, predict: str) -> None:
        if predict == "marked" and not chat.has_marks:
            raise ConfigError(
                "data.predict=marked predicts what the chat template marks with {% generation %}, and this one marks "
                "nothing; set data.predict=assistant, or mark it"
            )
        self.chat = chat
        self.predict = predict

    def render(self, rows: Sequence[ConversationRow]) -> list[RenderedConversation | RowError]:
        """Each row as text, or why it cannot be used."""
        return [self._rendered(row) for row in rows]

    def _rendered(self, row: ConversationRow) -> RenderedConversation | RowError:
        given = row.messages
        last = max((place for place, message in enumerate(given) if message["role"] == "assistant"), default=-1)
        if last < row.prompt_messages:
            return RowError("no answer", "the conversation has no message of the assistant to predict")
        messages = with_system(given[: last + 1], self.chat.system_prompt)
        added = len(messages) - (last + 1)
        turns = [
            place
            for place, message in enumerate(messages)
            if message["role"] == "assistant" and place >= row.prompt_messages + added
        ]
        try:
            text = self.chat.whole(messages, row.inputs)
            notes = [MESSAGES_LEFT_OUT] if last + 1 < len(given) else []
            spans = self._predicted(text, messages, turns, row.inputs, notes)
            if not spans:
                what = "marks no answer" if self.predict == "marked" else "writes no answer as it stands"
                return RowError(
                    "refused by the chat template", f"the chat template {what}: {shown(text_of(messages[-1]))}"
                )
            lost = self.chat.left_out(messages, row, text)
        except TemplateRefusal as error:
            return RowError("refused by the chat template", f"the chat template refuses the row: {error}")
        end = spans[-1][1]
        return RenderedConversation(text[:end], tuple(spans), tuple(dict.fromkeys(notes)), lost)

    def _predicted(
        self, text: str, messages: list[Message], turns: list[int], inputs: Inputs, notes: list[str]
    ) -> list[Span]:
        """What is predicted; what there is to say is added to ``notes``."""
        if self.predict == "all":
            return [(0, len(text))]
        marked = self._marked(text, messages, turns[0], inputs) if self.chat.has_marks else []
        if self.predict == "marked":
            return marked
        spans = self._spans(text, messages, turns, inputs, notes)
        if self.chat.has_marks and self.predict == "assistant":
            notes += differences(text, spans, marked)
        return spans

    def _marked(self, text: str, messages: list[Message], first: int, inputs: Inputs) -> list[Span]:
        """What the template marks, of answers that belong to a prompt nothing."""
        marked = self.chat.marked(messages, inputs)
        if all(message["role"] != "assistant" for message in messages[:first]):
            return marked
        return behind(marked, len(shared_beginning(text, self.chat.generation_prompt(messages[:first], inputs))))

    def _spans(
        self, text: str, messages: list[Message], turns: list[int], inputs: Inputs, notes: list[str]
    ) -> list[Span]:
        """The turns that are predicted; what there is to say is added to ``notes``."""
        spans = []
        for place in turns[-1:] if self.predict == "last" else turns:
            found = self._found(text, messages, place, inputs)
            if found is None:
                notes.append(REWRITTEN)
                continue
            end = self._end(text, found.stop, last=place == turns[-1])
            notes += [note for note in (found.note, None if end or self._appends(place, turns) else OPEN_ENDED) if note]
            spans.append((found.start, found.stop + len(end)))
        return spans

    def _appends(self, place: int, turns: list[int]) -> bool:
        """Whether EOS is put behind a turn."""
        return self.chat.append_eos and place == turns[-1]

    def _found(self, text: str, messages: list[Message], place: int, inputs: Inputs) -> _Found | None:
        message = messages[place]
        try:
            prompt = self.chat.generation_prompt(messages[:place], inputs) if place else ""
        except TemplateRefusal:  # a conversation that the assistant begins
            prompt = ""
        if prompt and not given_fields([message]):
            for header in dict.fromkeys((prompt, self.chat.header_of(prompt))):
                found = self._behind(text, header, text_of(message))
                if found is not None and text.startswith(prompt):
                    return _Found(len(prompt), found.stop, found.note)
                if found is not None:
                    return found
        return self._by_probes(text, messages, place, inputs, prompt)

    def _behind(self, text: str, header: str, said: str) -> _Found | None:
        """A turn whose text stands behind ``header``, as it is or but for blanks around it, and ends there."""
        if not text.startswith(header):
            return None
        for kept in (said, said.rstrip(), said.lstrip(), said.strip()):
            stop = len(header) + len(kept)
            if kept and text.startswith(kept, len(header)) and self._ends(text, stop):
                return _Found(len(header), stop, None if kept == said else BLANKS_LEFT_OUT)
        return None

    def _ends(self, text: str, stop: int) -> bool:
        """Whether the end of turn stands at ``stop``, or nothing does."""
        end = self.chat.end_of_turn
        return stop == len(text) or bool(end and text.startswith(end, stop))

    def _by_probes(self, text: str, messages: list[Message], place: int, inputs: Inputs, prompt: str) -> _Found | None:
        """A turn between what stays as it is, whatever the turn says."""
        around = (
            [*messages[:place], {"role": "assistant", "content": probe}, *messages[place + 1 :]] for probe in _PROBES
        )
        one, other = (self.chat.whole(changed, inputs) for changed in around)
        before = len(shared_beginning(one, other))
        behind = len(shared_end(one[before:], other[before:]))
        if one[before : len(one) - behind] != _PROBES[0] or other[before : len(other) - behind] != _PROBES[1]:
            return None
        header, tail = one[:before], one[len(one) - behind :]
        stop = len(text) - len(tail)
        if stop < before or not text.endswith(tail):
            return None
        if not text.startswith(header):
            return self._in_front_of(text, stop, messages[:place], text_of(messages[place]), inputs, prompt)
        region, said = text[before:stop], text_of(messages[place])
        squeezed, wanted = "".join(region.split()), "".join(said.split())
        fields = bool(given_fields([messages[place]]))
        if not region or (squeezed != wanted and not (fields and wanted in squeezed)):
            return None
        note = (
            None if region == said or fields else BLANKS_LEFT_OUT if said.strip() == region.strip() else BLANKS_CHANGED
        )
        if prompt and text.startswith(prompt) and len(prompt) <= before:
            return _Found(len(prompt), stop, note)
        return _Found(before, stop, note or OTHER_CONTEXT)

    def _in_front_of(
        self, text: str, stop: int, before: list[Message], said: str, inputs: Inputs, prompt: str
    ) -> _Found | None:
        """A turn that stands whole in front of ``stop``, and begins as its text has it (with a thought)."""
        bare = self.chat.whole(before, inputs) if before else ""
        shared = shared_beginning(text[:stop], prompt)
        if not shared.startswith(bare):
            return None
        if "".join(said.split()) not in "".join(text[len(bare) : stop].split()):
            return None
        ends = [len(bare), shared.rfind("\n") + 1]
        ends += [shared.rfind(mark) + len(mark) for mark in self.chat.turn_end.marks if mark in shared]
        start = len(prompt) if shared == prompt else max(ends)
        return _Found(start, stop, None if said in text[len(bare) : stop] else BLANKS_CHANGED)

    def _end(self, text: str, stop: int, *, last: bool) -> str:
        """What of the text at ``stop`` ends the turn."""
        if last:
            return self.chat.turn_end(text[stop:])[0]
        shared = shared_beginning(self.chat.end_of_turn, text[stop : stop + len(self.chat.end_of_turn)])
        marks = [shared.rfind(mark) + len(mark) for mark in self.chat.turn_end.marks if mark in shared]
        return shared[: max(marks, default=0)]
