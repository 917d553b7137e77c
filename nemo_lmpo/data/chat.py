"""Conversations as text: what of a rendered conversation is prompt and what is response.

A pair is rendered three times: its prompt with the template's generation prompt, and both finished conversations. Where
an answer stands in its finished conversation is found from the end: what the template puts behind an answer is known
from answers that stand for any, and an answer's own text must stand in front of it. Nothing is found by searching.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from nemo_lmpo.data.layout import (
    ANSWER_LEFT_OUT,
    BLANKS_CHANGED,
    CONVERSATION,
    GENERATION_PROMPT,
    PROMPT_LEFT_OUT,
    Layout,
    Place,
    Refused,
    RenderedPair,
    TurnEnd,
    before,
    behind,
    between,
    difference,
    layout_of,
    next_header,
    shared_beginning,
    shared_end,
    special_texts,
    starts_otherwise,
)
from nemo_lmpo.data.messages import PLAIN_INPUTS, Inputs, Message, RowError, text_of
from nemo_lmpo.data.render import TemplateRefusal, TemplateRenderer
from nemo_lmpo.data.schema import ConversationRow, PreferenceRow
from nemo_lmpo.data.unused import UnusedFields, refuse_empty_answers
from nemo_lmpo.errors import ConfigError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatFormat:
    """A chat template with a tokenizer: renders a pair as prompt text, chosen text and rejected text.

    A response ends with the template's end of turn; what the template puts behind that (ChatML's newline) does not
    belong to it. The prompt is the template's generation prompt. Where finished conversations go on otherwise
    (DeepSeek-R1 begins to think, finished answers have no thought), ``prompt_from`` decides.

    Args:
        tokenizer: gives the special tokens that the template may use.
        template: the template's Jinja text.
        system_prompt: a system message for conversations that have none.
        prompt_from: as `data.prompt_from`.

    Raises:
        ConfigError: the template cannot render a plain exchange, or gives no way to end a response.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        system_prompt: str | None = None,
        prompt_from: str = CONVERSATION,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.system_prompt = system_prompt
        self.prompt_from = prompt_from
        self._render = TemplateRenderer(tokenizer, template)
        self._unused = UnusedFields(self._render)
        hello: list[Message] = [{"role": "user", "content": "Hello"}]
        try:
            prompt, layout = self._plain_exchange(hello)
        except TemplateRefusal as error:
            raise ConfigError(f"data.chat_template cannot render a plain exchange ({error}); correct it") from None
        if layout is None:
            raise ConfigError("data.chat_template leaves out the assistant's text; use another template")
        self.example = prompt
        """A user message as the template renders it for generation."""
        self._plain = layout
        self.turn_end = TurnEnd(tokenizer, self._next_header(hello, prompt, layout.tail))
        self.end_of_turn, self.append_eos = self.turn_end(layout.tail)
        self.bos_marks_turns = self._bos_marks_turns(prompt)
        """Whether what the tokenizer calls BOS is the marker in front of every message (SmolLM2)."""

    def end_of_turn_id(self) -> int:
        """The token that ends a response."""
        if self.append_eos:
            return int(self.tokenizer.eos_token_id)
        return int(self.tokenizer(self.end_of_turn, add_special_tokens=False)["input_ids"][-1])

    def _plain_exchange(self, messages: list[Message]) -> tuple[str, Layout | None]:
        """Generation prompt and layout of messages that stand for any, without tools, or with an empty list of them."""
        try:
            prompt = self._render([messages], generate=True)[0]
            return prompt, layout_of(self._render, messages, prompt)
        except TemplateRefusal:
            no_tools = Inputs(tools=[])
            prompt = self._render([messages], no_tools, generate=True)[0]
            return prompt, layout_of(self._render, messages, prompt, no_tools)

    def render(self, rows: Sequence[PreferenceRow]) -> list[RenderedPair | RowError]:
        """Each row as text, or why the template does not take it."""
        plain = [row for row in rows if row.inputs == PLAIN_INPUTS]
        rendered = {id(row): result for row, result in zip(plain, self._rendered(plain, PLAIN_INPUTS), strict=True)}
        return [
            rendered[id(row)] if row.inputs == PLAIN_INPUTS else self._rendered([row], row.inputs)[0] for row in rows
        ]

    def prompt(self, messages: list[Message], inputs: Inputs = PLAIN_INPUTS) -> str:
        """The generation prompt behind messages, as a server renders it.

        Raises:
            TemplateRefusal: the template does not take the messages.
        """
        return self.generation_prompt(with_system(messages, self.system_prompt), inputs)

    def whole(self, messages: list[Message], inputs: Inputs = PLAIN_INPUTS) -> str:
        """A finished conversation, as it stands.

        Raises:
            TemplateRefusal: the template does not take the messages.
        """
        return self._render([messages], inputs)[0]

    def generation_prompt(self, messages: list[Message], inputs: Inputs = PLAIN_INPUTS) -> str:
        """The generation prompt behind messages, as they stand.

        Raises:
            TemplateRefusal: the template does not take the messages.
        """
        return self._render([messages], inputs, generate=True)[0]

    @property
    def has_marks(self) -> bool:
        """Whether the template marks what the assistant says (`{% generation %}`)."""
        return self._render.has_marks

    def marked(self, messages: list[Message], inputs: Inputs = PLAIN_INPUTS) -> list[tuple[int, int]]:
        """Start and stop of what the template marks in a finished conversation.

        Raises:
            TemplateRefusal: the template does not take the messages.
        """
        return self._render.marked(messages, inputs)

    def header_of(self, prompt: str) -> str:
        """How a finished conversation goes up to its answer, where its generation prompt is ``prompt``."""
        _, _, cut, added = self._plain
        return prompt[: len(prompt) - len(cut)] + added if prompt.endswith(cut) else prompt

    def left_out(self, messages: list[Message], row: ConversationRow, text: str) -> tuple[str, ...]:
        """Names of what the template leaves out of a conversation that it rendered as ``text``."""
        return self._unused.of_conversation(messages, row, text)

    def _rendered(self, rows: Sequence[PreferenceRow], inputs: Inputs) -> list[RenderedPair | RowError]:
        if not rows:
            return []
        prompts = [with_system(row.prompt, self.system_prompt) for row in rows]
        chosen = [[*prompt, row.chosen_message] for prompt, row in zip(prompts, rows, strict=True)]
        rejected = [[*prompt, row.rejected_message] for prompt, row in zip(prompts, rows, strict=True)]
        try:
            texts = [self._render(prompts, inputs, generate=True), self._render(chosen, inputs)]
            texts.append(self._render(rejected, inputs) if rejected != chosen else texts[1])
        except TemplateRefusal as error:
            if len(rows) == 1:
                return [RowError("refused by the chat template", f"the chat template refuses the row: {error}")]
            return [self._rendered([row], inputs)[0] for row in rows]
        return [
            self._laid(prompt, row, *rendered) for prompt, row, *rendered in zip(prompts, rows, *texts, strict=True)
        ]

    def _laid(
        self, messages: list[Message], row: PreferenceRow, prompt: str, chosen: str, rejected: str
    ) -> RenderedPair | RowError:
        pair = self._laid_as_usual(row, prompt, chosen, rejected)
        try:
            if pair is None:
                pair = _PairLayout(self, messages, row, prompt, chosen, rejected).laid()
            lost = self._unused.of(messages, row, (prompt, chosen, rejected))
            refuse_empty_answers(row, lost)
            return replace(pair, lost=lost)
        except RowError as error:
            return error
        except (Refused, TemplateRefusal) as error:
            return RowError("refused by the chat template", str(error))

    def _laid_as_usual(self, row: PreferenceRow, prompt: str, chosen: str, rejected: str) -> RenderedPair | None:
        """The pair, where the template does with it exactly what it did with the plain exchange."""
        header, tail, cut, added = self._plain
        if row.has_fields or not prompt.endswith(cut):
            return None
        header = prompt[: len(prompt) - len(cut)] + added
        places = []
        for full, text in ((chosen, row.chosen), (rejected, row.rejected)):
            place = between(full, header, tail, text)
            if place is None:
                return None
            places.append(place)
        return self._pair(prompt, header, cut, added, (chosen, rejected), places)

    def _pair(
        self, prompt: str, header: str, cut: str, added: str, texts: tuple[str, str], places: Sequence[Place]
    ) -> RenderedPair:
        """The pair of answers that stand at ``places``, all behind ``header``."""
        notes = [place.note for place in places if place.note]
        ends = [place.end or self.end_of_turn for place in places]
        bodies = [
            text[place.start : place.stop] if place.given is None else place.given
            for text, place in zip(texts, places, strict=True)
        ]
        if not cut:
            start = prompt
            bodies = [added + body for body in bodies]
            if added.strip():
                notes.append(f"the chat template writes {shown(added)} in front of the answer, which is trained")
        elif self.prompt_from == GENERATION_PROMPT:
            start = prompt
            bodies = [behind(body, cut, added) for body in bodies]
            notes.append(starts_otherwise(cut, added) + "; the answers are laid behind the generation prompt")
        else:
            start = header
            notes.append(starts_otherwise(cut, added))
        chosen, rejected = (body + end for body, end in zip(bodies, ends, strict=True))
        return RenderedPair(start, chosen, rejected, tuple(dict.fromkeys(notes)))

    def _next_header(self, messages: list[Message], prompt: str, tail: str) -> str:
        try:
            always = self._render([messages])[0] == prompt  # whether an answer is asked for or not
        except TemplateRefusal:
            return ""
        return next_header(prompt, tail, special_texts(self.tokenizer)) if always else ""

    def _bos_marks_turns(self, prompt: str) -> bool:
        bos = str(self.tokenizer.bos_token or "")
        if not bos or bos == str(self.tokenizer.eos_token):
            return False
        while prompt.startswith(bos):  # written twice, it marks no turn
            prompt = prompt.removeprefix(bos)
        return bos in prompt


class _PairLayout:
    """One pair that the template does not lay as it laid the plain exchange."""

    def __init__(
        self, chat: ChatFormat, messages: list[Message], row: PreferenceRow, prompt: str, chosen: str, rejected: str
    ) -> None:
        self.chat = chat
        self.row = row
        self.prompt = prompt
        self.texts = (chosen, rejected)
        layout = layout_of(chat._render, messages, prompt, row.inputs)
        if layout is None:
            raise Refused("the chat template does not write an answer's text in one place behind this prompt")
        self.layout = layout
        bare = chat._render([messages], row.inputs)[0]
        self.bare = bare if prompt.startswith(bare) else shared_beginning(bare, prompt)
        """The prompt without what asks for an answer."""

    def laid(self) -> RenderedPair:
        """The pair as text.

        Raises:
            Refused: it cannot be laid so that both answers stand in it whole, behind the same prompt.
        """
        places = [
            self._place(full, message, name)
            for full, message, name in zip(
                self.texts, (self.row.chosen_message, self.row.rejected_message), ("chosen", "rejected"), strict=True
            )
        ]
        headers = [full[: place.start] for full, place in zip(self.texts, places, strict=True)]
        prompt, bare = self.prompt, self.bare
        if any(place.given is not None for place in places):
            return self._as_given(places)
        if all(full.startswith(prompt) for full in self.texts) and all(map(self._is_behind_prompt, places)):
            added = headers[0][len(prompt) :] if headers[0] == headers[1] else ""
            places = [place._replace(start=len(prompt) + len(added)) for place in places]
            return self.chat._pair(prompt, prompt + added, "", added, self.texts, places)
        if all(header.startswith(bare) for header in headers):
            header = headers[0] if headers[0] == headers[1] else self._shared_header()
            places = [place._replace(start=len(header)) for place in places]
            return self.chat._pair(prompt, header, *difference(prompt, header), self.texts, places)
        return self._on_the_generation_prompt(places, headers)

    def _as_given(self, places: Sequence[Place]) -> RenderedPair:
        """A pair of which the finished conversations lack part of an answer, on the generation prompt."""
        places = [
            place._replace(start=len(self.prompt)) if place.given is None and full.startswith(self.prompt) else place
            for full, place in zip(self.texts, places, strict=True)
        ]
        header, _, cut, added = self.layout
        if cut:
            return self.chat._pair(self.prompt, header, cut, added, self.texts, places)
        return self.chat._pair(self.prompt, self.prompt, "", "", self.texts, places)

    def _is_behind_prompt(self, place: Place) -> bool:
        """Whether an answer begins behind the prompt's messages: the generation prompt may open it (`<think>`)."""
        return len(self.bare) <= place.start and len(self.prompt) <= place.stop

    def _place(self, full: str, message: Message, name: str) -> Place:
        text, fields = text_of(message), self.row.has_fields
        header, tail = self.layout.header, self.layout.tail
        if full.endswith(tail):
            stop, end = len(full) - len(tail), self._end(tail)
            if not fields:
                place = between(full, header, tail, text) or before(full, stop, text)
                if place is not None:
                    return place._replace(end=end)
        elif fields:
            stop, end = self._own_end(full)
        else:
            raise Refused(f"the chat template ends the {name} answer unlike others")
        start = self._start_of_answer(full, stop)
        squeezed, whole = "".join(full[start:stop].split()), "".join(text.split())
        if not fields and not squeezed.endswith(whole) and full.startswith(self.prompt):
            # the generation prompt may have opened the answer
            squeezed = "".join(full[len(self.bare) : stop].split())
        if squeezed.endswith(whole) or (fields and whole in squeezed):
            verbatim = text in full[start:stop]
            return Place(start, stop, end, None if verbatim else BLANKS_CHANGED)
        if self.chat.prompt_from == GENERATION_PROMPT and not fields:
            return Place(len(self.layout.header), stop, end, ANSWER_LEFT_OUT, given=text)
        raise Refused(
            f"the chat template leaves out part of the {name} answer: it writes {shown(full[start:stop])} for "
            f"{shown(text)}" + ("" if fields else "; data.prompt_from=generation_prompt trains it as it stands")
        )

    def _end(self, tail: str) -> str:
        end, append_eos = self.chat.turn_end(tail)
        if append_eos != self.chat.append_eos:
            raise Refused("the chat template ends this response unlike others")
        return end

    def _own_end(self, full: str) -> tuple[int, str]:
        """Where an answer with further fields ends, if not as a text does, and its end of turn."""
        kept = full.rstrip()
        mark = self.chat.turn_end.last_mark(kept)
        if not mark:
            raise Refused("the chat template ends this response unlike others")
        return len(kept) - len(mark), mark

    def _start_of_answer(self, full: str, stop: int) -> int:
        """Where an answer begins at the latest whose text the template does not write as it is."""
        for header in (self.prompt, self.layout.header):
            if full.startswith(header) and len(header) <= stop:
                return len(header)
        return len(self._shared_header())

    def _shared_header(self) -> str:
        """What both conversations share with the generation prompt, up to a place where a token ends."""
        shared = shared_beginning(self.prompt, *self.texts)
        if not shared.startswith(self.bare):
            raise Refused("the chat template changes the prompt with the response")
        ends = [len(self.bare), shared.rfind("\n") + 1]
        ends += [shared.rfind(mark) + len(mark) for mark in self.chat.turn_end.marks if mark in shared]
        return shared[: max(ends)]

    def _on_the_generation_prompt(self, places: Sequence[Place], headers: Sequence[str]) -> RenderedPair:
        """A pair whose finished conversations leave out part of the prompt (Mistral's system text).

        Raises:
            Refused: they differ from the generation prompt in another way.
        """
        plain = self.chat._plain
        added = plain.added if not plain.cut else ""
        for header in headers:
            if not header.endswith(added):
                raise Refused("the chat template changes the prompt with the response")
            header = header[: len(header) - len(added)]
            before = len(shared_beginning(self.prompt, header))
            behind = len(shared_end(self.prompt, header))
            if before + behind < len(header) or len(self.prompt) <= len(header):
                raise Refused("the chat template changes the prompt with the response")
        pair = self.chat._pair(self.prompt, self.prompt, "", added, self.texts, places)
        return replace(pair, notes=(*pair.notes, PROMPT_LEFT_OUT))


def with_system(prompt: list[Message], system_prompt: str | None) -> list[Message]:
    """The prompt, behind a system message if it has none and there is one to give."""
    if system_prompt is None or prompt[0]["role"] == "system":
        return prompt
    return [{"role": "system", "content": system_prompt}, *prompt]


def assistant(text: str) -> Message:
    """A message of the assistant."""
    return {"role": "assistant", "content": text}
