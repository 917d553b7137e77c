"""Texts as token ids: prompt and responses kept apart, one BOS, lengths bounded."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, replace
from typing import TYPE_CHECKING

from nemo_lmpo.data.chat import ChatFormat
from nemo_lmpo.data.conversations import ConversationEncoder
from nemo_lmpo.data.layout import CONVERSATION
from nemo_lmpo.data.messages import Inputs, Message, RowError
from nemo_lmpo.data.render import TemplateRefusal
from nemo_lmpo.data.schema import ConversationRow, PreferenceRow, Row, UnpairedRow
from nemo_lmpo.data.special_tokens import SpecialTokens
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.runtime.chat_record import ChatRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts to put in front of a response, so that a tokenizer that begins every text with a space begins these with it.
_ANCHORS = ("\n", "a", ".")
_CHARACTERS_PER_TOKEN = 16
"""Letters of a long text that are tokenized for each token it may keep; more if these turn out not to suffice."""
_SPARE_TOKENS = 64
"""Tokens beyond those kept, so that a text's cut end does not show in them."""
_TAIL_LETTERS = 256
"""Letters of a prompt's end that are tokenized again with each response."""


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of one row and whether anything was cut off."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    """Of a conversation all from the first token that is predicted to the last."""
    rejected_ids: list[int] | None
    """None: a conversation, or an answer with a label."""
    prompt_cut: bool
    response_cut: bool
    special_tokens: bool = False
    """Whether the texts hold special tokens of the tokenizer."""
    notes: tuple[str, ...] = ()
    """How the chat template's text differs from the row, or from what a model is prompted with."""
    lost: tuple[str, ...] = ()
    """What of the row is not in the ids: the chat template does not render it, or nothing uses it."""
    spans: list[int] | None = None
    """Start and stop of each span of ``chosen_ids`` that is predicted, one behind the other; None: all of them are."""
    desirable: bool | None = None
    """The label of an answer that has one; it stands in ``chosen_ids``, whatever its label."""


@dataclass(eq=False)
class Encoder(ABC):
    """Renders and tokenizes rows, within bounds of length.

    Raises:
        ConfigError: lengths that leave no room, or a template or tokenizer that cannot be used.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    """Jinja text of the chat template."""
    _: KW_ONLY
    max_length: int
    """Most tokens of prompt and response."""
    max_prompt_length: int
    """Tokens of the prompt where the pair does not fit otherwise."""
    system_prompt: str | None = None
    """A system message for conversations that have none."""
    prompt_from: str = CONVERSATION
    """As `data.prompt_from`."""
    predict: str = "assistant"
    """As `data.predict`."""
    special: InitVar[SpecialTokens | None] = None
    """What becomes of special tokens in the texts."""

    def __post_init__(self, special: SpecialTokens | None) -> None:
        if not 1 <= self.max_prompt_length < self.max_length:
            raise ConfigError(
                f"data.max_length={self.max_length} leaves no room for a prompt and a response with "
                f"data.max_prompt_length={self.max_prompt_length}, which must be at least 1 and below it"
            )
        self.special_tokens = special or SpecialTokens(self.tokenizer)

    @property
    def settings(self) -> list[object]:
        """What decides the ids, beside the tokenizer."""
        lengths = [self.max_length, self.max_prompt_length]
        return [self.template, self.system_prompt, *lengths, self.prompt_from, self.predict]

    @abstractmethod
    def record(self) -> ChatRecord:
        """What every later use of the model has to do alike."""

    def encode(self, rows: Sequence[Row]) -> list[EncodedRow | RowError]:
        """Token ids of each row, or why it cannot be used."""
        pairs = [row for row in rows if isinstance(row, PreferenceRow)]
        conversations = [row for row in rows if isinstance(row, ConversationRow)]
        answers = [row for row in rows if isinstance(row, UnpairedRow)]
        encoded = {
            PreferenceRow: iter(self._encode_pairs(pairs)),
            ConversationRow: iter(self._encode_conversations(conversations)),
            UnpairedRow: iter(self._encode_answers(answers)),
        }
        return [next(encoded[type(row)]) for row in rows]

    @abstractmethod
    def _encode_pairs(self, rows: Sequence[PreferenceRow]) -> list[EncodedRow | RowError]:
        """Token ids of each pair, or why it cannot be used."""

    @abstractmethod
    def _encode_conversations(self, rows: Sequence[ConversationRow]) -> list[EncodedRow | RowError]:
        """Token ids of each conversation, or why it cannot be used."""

    @abstractmethod
    def _encode_answers(self, rows: Sequence[UnpairedRow]) -> list[EncodedRow | RowError]:
        """Token ids of each answer with a label, or why it cannot be used."""

    def _recorded(self, chat: ChatFormat, *, adds_bos: bool) -> ChatRecord:
        """``adds_bos``: whether prompts get a BOS where the template writes none."""
        bos, end = self.tokenizer.bos_token, chat.end_of_turn_id()
        return ChatRecord(
            template=self.template,
            system_prompt=self.system_prompt,
            adds_bos=adds_bos and not (bos and chat.example.startswith(str(bos))),
            end_of_turn=str(self.tokenizer.convert_ids_to_tokens(end)),
            end_of_turn_id=end,
        )

    @abstractmethod
    def _end_of_prompt(self, ids: list[int]) -> list[int]:
        """What a prompt that is cut keeps."""

    def _room(self, prompt: list[int]) -> int:
        """Tokens of a response where it is cut behind ``prompt``."""
        return self.max_length - len(prompt)

    def _bounded(
        self,
        prompt: list[int],
        chosen: list[int],
        rejected: list[int] | None,
        special: bool,
        notes: tuple[str, ...] = (),
        lost: tuple[str, ...] = (),
    ) -> EncodedRow | RowError:
        """A pair within the bounds of length, or a prompt with its only answer."""
        if not prompt:
            detail = "the prompt has no tokens, so nothing could predict the first response token"
            return RowError("empty prompt", detail)
        longer = max(len(chosen), len(rejected or ()))
        prompt_cut = len(prompt) + longer > self.max_length and len(prompt) > self.max_prompt_length
        if prompt_cut:
            prompt = self._end_of_prompt(prompt)
        room, response_cut = self._room(prompt), len(prompt) + longer > self.max_length
        if response_cut:
            chosen, rejected = chosen[:room], None if rejected is None else rejected[:room]
        if chosen == rejected and response_cut:
            detail = f"chosen and rejected are equal in the {room} tokens that data.max_length={self.max_length} leaves"
            return RowError("equal after truncation", detail)
        if chosen == rejected:
            detail = "chosen and rejected have the same token ids"
            if lost:
                detail += f"; they differ in what is not rendered: {', '.join(lost)}"
            return RowError("chosen equals rejected", detail)
        if not chosen or rejected == []:
            return RowError("empty response", "a response has no tokens")
        return EncodedRow(prompt, chosen, rejected, prompt_cut, response_cut, special, notes, lost)

    def bounded_conversation(
        self,
        prompt: list[int],
        ids: list[int],
        spans: Sequence[tuple[int, int]],
        special: bool,
        notes: tuple[str, ...],
        lost: tuple[str, ...],
    ) -> EncodedRow | RowError:
        """A conversation within the bounds of length, up to the last token that is predicted."""
        if not prompt:
            return RowError("empty prompt", "the conversation has no tokens")
        long = len(prompt) + len(ids) > self.max_length
        prompt_cut = long and len(prompt) > self.max_prompt_length
        if prompt_cut:
            prompt = self._end_of_prompt(prompt)
        room = self._room(prompt)
        kept = [(start, min(stop, room)) for start, stop in spans if start < min(stop, room)]
        if not kept:
            detail = f"nothing that is predicted is left in the tokens that data.max_length={self.max_length} allows"
            return RowError("nothing to predict", detail)
        whole = None if kept == [(0, len(ids))] else [border for span in kept for border in span]
        cut = len(prompt) + len(ids) > self.max_length
        return EncodedRow(prompt, ids[: kept[-1][1]], None, prompt_cut, cut, special, notes, lost, whole)


class PairEncoder(Encoder):
    """Tokenizes what the chat template makes of a pair; conversations alike.

    ``prompt_ids + response_ids`` is the tokenization of the whole conversation wherever its first tokens are the
    prompt's; where prompt and response would merge into one token, the response is tokenized on its own.
    """

    def __post_init__(self, special: SpecialTokens | None) -> None:
        super().__post_init__(special)
        self._tokenize = self.special_tokens.tokenize
        self.chat = ChatFormat(self.tokenizer, self.template, self.system_prompt, self.prompt_from)
        self._bos = self.tokenizer.bos_token_id
        self._kept = self.max_length + _SPARE_TOKENS
        """Tokens of a long text that are made at least."""
        self._end = self.chat.end_of_turn_id()
        self._adds_bos = self._bos is not None and self.tokenizer("a")["input_ids"][:1] == [self._bos]
        self._begins_with_space = self._tokenize(["a b"])[0][-1:] == self._tokenize(["b"])[0]
        self._turn_marks = _turn_marks(self.tokenizer)
        self._conversations = ConversationEncoder(self, self.predict)

    def record(self) -> ChatRecord:
        """What every later use of the model has to do alike."""
        return self._recorded(self.chat, adds_bos=self._adds_bos)

    def _encode_conversations(self, rows: Sequence[ConversationRow]) -> list[EncodedRow | RowError]:
        return self._conversations.encode(rows)

    def _encode_pairs(self, rows: Sequence[PreferenceRow]) -> list[EncodedRow | RowError]:
        return self._encoded(rows)

    def _encode_answers(self, rows: Sequence[UnpairedRow]) -> list[EncodedRow | RowError]:
        # The ids of an answer must not depend on whether it comes with a label or in a pair.
        return [
            RowError(found.reason, found.detail.replace("the chosen answer", "the answer"))
            if isinstance(found, RowError)
            else replace(found, desirable=row.label)
            for row, found in zip(rows, self._encoded([row.as_pair() for row in rows], alone=True), strict=True)
        ]

    def _encoded(self, rows: Sequence[PreferenceRow], *, alone: bool = False) -> list[EncodedRow | RowError]:
        """Token ids of pairs, or of their chosen answers ``alone``."""
        checked = [self.special_tokens.checked(row) for row in rows]
        rendered = iter(self.chat.render([row for row in checked if isinstance(row, PreferenceRow)]))
        results = [row if isinstance(row, RowError) else next(rendered) for row in checked]
        good = [texts for texts in results if not isinstance(texts, RowError)]
        prompts = self.beginnings([texts.prompt for texts in good])
        tails = self._tails([texts.prompt for texts in good], prompts)
        chosen = self._responses(tails, [texts.chosen for texts in good])
        rejected: Sequence[list[int] | None] = [None] * len(good)
        if not alone:
            rejected = self._responses(tails, [texts.rejected for texts in good])
        special = [
            self.special_tokens.found_in(row) is not None
            for row, texts in zip(rows, results, strict=True)
            if not isinstance(texts, RowError)
        ]
        prompts = [self.with_one_bos(prompt) for prompt in prompts]
        notes, lost = [texts.notes for texts in good], [texts.lost for texts in good]
        encoded = iter(
            [self._bounded(*ids) for ids in zip(prompts, chosen, rejected, special, notes, lost, strict=True)]
        )
        return [texts if isinstance(texts, RowError) else next(encoded) for texts in results]

    def encode_prompts(self, prompts: Sequence[tuple[list[Message], Inputs]]) -> list[list[int] | RowError]:
        """Token ids of each prompt up to where an answer begins: the template's generation prompt."""
        results: list[str | RowError] = []
        for messages, inputs in prompts:
            checked = self.special_tokens.checked(PreferenceRow(messages, "", "", inputs=inputs))
            try:
                text = checked if isinstance(checked, RowError) else self.chat.prompt(checked.prompt, checked.inputs)
            except TemplateRefusal as error:
                text = RowError("refused by the chat template", f"the chat template refuses the prompt: {error}")
            results.append(text)
        ids = iter(self.beginnings([text for text in results if isinstance(text, str)]))
        return [text if isinstance(text, RowError) else self.with_one_bos(next(ids)) for text in results]

    def _in_bulk(self, texts: list[str], alone: Callable[[int], list[int]]) -> list[list[int]]:
        """Ids of texts, in one call but for those much longer than may be kept: ``alone`` gives one's, by its place."""
        fits = [len(text) <= self._kept * _CHARACTERS_PER_TOKEN for text in texts]
        short = iter(self._tokenize([text for text, whole in zip(texts, fits, strict=True) if whole]))
        return [next(short) if whole else alone(place) for place, whole in enumerate(fits)]

    def beginnings(self, texts: list[str]) -> list[list[int]]:
        """Ids of each prompt; of one that is much longer than may be kept, its BOS and more of its end than that."""
        return self._in_bulk(texts, lambda place: self._end_of(texts[place]))

    def _end_of(self, text: str) -> list[int]:
        characters = self._kept * _CHARACTERS_PER_TOKEN
        while characters < len(text):
            ids = self._tokenize([text[-characters:]])[0][_SPARE_TOKENS:]
            if len(ids) >= self._kept:
                starts_with_bos = self._bos is not None and text.startswith(str(self.tokenizer.bos_token))
                return [self._bos, *ids] if starts_with_bos else ids
            characters *= 4
        return self._tokenize([text])[0]

    def _tails(self, prompts: list[str], ids: list[list[int]]) -> list[tuple[str, list[int]]]:
        """The end of each prompt that has to be tokenized again with a response, and its ids in the prompt."""
        starts = [self._tail_start(prompt) for prompt in prompts]
        tails = [prompt[start:] for prompt, start in zip(prompts, starts, strict=True)]
        distinct = list(dict.fromkeys(tails))  # most often the header of an answer, the same for all
        of_text = dict(zip(distinct, self._tokenize(distinct), strict=True))
        alone = [of_text[tail] for tail in tails]
        return [
            (tail, tail_ids) if prompt_ids[len(prompt_ids) - len(tail_ids) :] == tail_ids else (prompt, prompt_ids)
            for prompt, prompt_ids, tail, tail_ids in zip(prompts, ids, tails, alone, strict=True)
        ]

    def _tail_start(self, prompt: str) -> int:
        """A place where a token begins whatever follows the prompt: a turn's mark, or a word some characters back.

        Marks are not part of what is merged, so that both sides of one are tokenized on their own. Elsewhere, merges
        do not reach back through so many characters.
        """
        window = max(len(prompt) - 2 * _TAIL_LETTERS, 0)
        if self._turn_marks is not None:
            marks = [found.start() for found in self._turn_marks.finditer(prompt, window)]
            if marks and (window == 0 or marks[-1] > window + _TAIL_LETTERS // 4):
                return marks[-1]
        for place in range(len(prompt) - _TAIL_LETTERS, window, -1):
            if prompt[place] == " " and prompt[place - 1].isalnum() and prompt[place + 1].isalnum():
                return place + 1 if self._begins_with_space else place
        return 0

    def _responses(self, tails: list[tuple[str, list[int]]], texts: list[str]) -> list[list[int]]:
        return [self.ended(ids, last=True) for ids in self._behind(tails, texts)]

    def ended(self, ids: list[int], *, last: bool) -> list[int]:
        """A response with one end of turn; of the ``last`` one EOS is put behind it where the template writes none."""
        if last and self.chat.append_eos:
            ids = [*ids, self._end]
        while ids[-2:] == [self._end, self._end]:  # the data's text ended with the token already
            ids = ids[:-1]
        return ids

    def continuations(self, texts: list[str], ids: list[list[int]], more: list[str]) -> list[list[int]]:
        """Ids of what follows each text, whose own ids are known."""
        return self._behind(self._tails(texts, ids), more)

    def _behind(self, tails: list[tuple[str, list[int]]], texts: list[str]) -> list[list[int]]:
        wholes = [tail + text for (tail, _), text in zip(tails, texts, strict=True)]
        bulk = self._in_bulk(wholes, lambda place: self._beginning_of(wholes[place], len(tails[place][1]) + self._kept))
        responses = []
        for (_, tail_ids), text, ids in zip(tails, texts, bulk, strict=True):
            responses.append(ids[len(tail_ids) :] if ids[: len(tail_ids)] == tail_ids else self._alone(text))
        return responses

    def _beginning_of(self, text: str, wanted: int) -> list[int]:
        """The first ``wanted`` ids at least, if the text has as many."""
        characters = wanted * _CHARACTERS_PER_TOKEN
        while characters < len(text):
            ids = self._tokenize([text[:characters]])[0][:-_SPARE_TOKENS]
            if len(ids) >= wanted:
                return ids
            characters *= 4
        return self._tokenize([text])[0]

    def _alone(self, response: str) -> list[int]:
        """Ids of a response that would merge with its prompt, without the space some tokenizers put in front."""
        for anchor in _ANCHORS:
            before = self._tokenize([anchor])[0]
            ids = self._beginning_of(anchor + response, self._kept)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self._beginning_of(response, self._kept)

    def with_one_bos(self, ids: list[int]) -> list[int]:
        """One BOS if the template wrote any or the tokenizer would add one, else none."""
        if self._bos is None:
            return ids
        repeated = next((i for i, token in enumerate(ids) if token != self._bos), len(ids))
        return [self._bos, *ids[repeated:]] if repeated or self._adds_bos else ids

    def _end_of_prompt(self, ids: list[int]) -> list[int]:
        """The prompt's last tokens, behind its BOS if it has a real one."""
        if ids[0] == self._bos and not self.chat.bos_marks_turns and self.max_prompt_length > 1:
            return [ids[0], *ids[len(ids) - self.max_prompt_length + 1 :]]
        return ids[len(ids) - self.max_prompt_length :]


def _turn_marks(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Finds added tokens that are taken out of a text before anything else is, wherever they stand."""
    tokens = tokenizer.added_tokens_decoder.values() if getattr(tokenizer, "backend_tokenizer", None) else []
    marks = sorted((token.content for token in tokens if not (token.normalized or token.single_word)), key=len)
    marks = [mark for mark in marks if mark and len(mark) < _TAIL_LETTERS // 4]
    return re.compile("|".join(map(re.escape, reversed(marks)))) if marks else None
