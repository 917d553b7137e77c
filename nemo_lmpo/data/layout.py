"""How a chat template lays an answer behind a prompt: where its text stands, and what ends it. Pure text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from nemo_lmpo.data.messages import PLAIN_INPUTS, Inputs, Message
from nemo_lmpo.errors import ConfigError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nemo_lmpo.data.render import TemplateRenderer

_PROBES = ("zqprobeqz", "xkmarkerkx")
"""Answers that stand for any: they share neither beginning nor end."""
CONVERSATION, GENERATION_PROMPT = "conversation", "generation_prompt"

BLANKS_LEFT_OUT = "the chat template leaves out blanks around the answer"
BLANKS_CHANGED = "the chat template changes blanks within the answer"
ANSWER_LEFT_OUT = "the chat template leaves out part of the answer, which is trained as it stands"
PROMPT_LEFT_OUT = "finished conversations leave out part of the prompt, so pairs are laid on the generation prompt"


class Refused(Exception):
    """Why a pair cannot be laid; becomes a `RowError`."""


@dataclass(frozen=True)
class RenderedPair:
    """A pair as text. Without a BOS that the tokenizer, not the template, adds; without EOS where it is appended."""

    prompt: str
    chosen: str
    rejected: str
    notes: tuple[str, ...] = ()
    """How the template's finished conversations differ from what a model is prompted with, or from the row."""
    lost: tuple[str, ...] = ()
    """What of the row the template does not render."""


class Layout(NamedTuple):
    """How the template lays answers behind a prompt."""

    header: str
    """The finished conversation up to an answer's own text."""
    tail: str
    """What stands behind it."""
    cut: str
    """The part of the generation prompt that the finished conversation does not have..."""
    added: str
    """... and what it has in that place."""


class Place(NamedTuple):
    """Where an answer's own text stands in its finished conversation."""

    start: int
    stop: int
    end: str
    """What of the template's text behind it is trained."""
    note: str | None = None
    given: str | None = None
    """The text of the row, where the finished conversation lacks part of it."""


def shared_beginning(one: str, *others: str) -> str:
    """The longest text that all texts begin with."""
    low, high = 0, min(map(len, (one, *others)))
    while low < high:
        middle = (low + high + 1) // 2
        if all(other.startswith(one[:middle]) for other in others):
            low = middle
        else:
            high = middle - 1
    return one[:low]


def shared_end(one: str, *others: str) -> str:
    """The longest text that all texts end with."""
    return shared_beginning(one[::-1], *(other[::-1] for other in others))[::-1]


def layout_of(
    render: TemplateRenderer, messages: list[Message], prompt: str, inputs: Inputs = PLAIN_INPUTS
) -> Layout | None:
    """How answers are laid behind these messages; None if an answer's text does not stand in one place."""
    one, other = render([[*messages, {"role": "assistant", "content": text}] for text in _PROBES], inputs)
    before = len(shared_beginning(one, other))
    behind = len(shared_end(one[before:], other[before:]))
    if one[before : len(one) - behind] != _PROBES[0] or other[before : len(other) - behind] != _PROBES[1]:
        return None
    header, tail = one[:before], one[len(one) - behind :]
    return Layout(header, tail, *difference(prompt, header))


class TurnEnd:
    """What of the text behind an answer ends it.

    Args:
        tokenizer: gives the special tokens.
        always_behind: a header of the next answer that the template writes behind finished conversations, too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, always_behind: str = "") -> None:
        self.marks = special_texts(tokenizer)
        self._always_behind = always_behind
        self._eos = "" if tokenizer.eos_token_id is None else str(tokenizer.eos_token)

    def __call__(self, tail: str) -> tuple[str, bool]:
        """The end of turn in the text behind an answer, and whether EOS has to be appended to it.

        That is the text up to EOS; without EOS, up to the end of its first special tokens that follow one another;
        without any, its text, and EOS is appended.

        Raises:
            ConfigError: neither the template nor the tokenizer has such a token.
        """
        if self._eos and self._eos in tail:
            return tail[: tail.index(self._eos) + len(self._eos)], False
        tail = tail.removesuffix(self._always_behind)
        stop = self._end_of_marks(tail)
        if stop:
            return tail[:stop], False
        if not self._eos:
            raise ConfigError(
                "neither data.chat_template nor the tokenizer has a token that ends a response; set eos_token"
            )
        return tail.rstrip(), True

    def last_mark(self, text: str) -> str:
        """The special token that a text ends with."""
        return max((mark for mark in self.marks if text.endswith(mark)), key=len, default="")

    def _end_of_marks(self, text: str) -> int:
        """Where the first special tokens that follow one another end; 0 without any."""
        found = [(text.find(mark), -len(mark), mark) for mark in self.marks if mark in text]
        if not found:
            return 0
        start, _, mark = min(found)
        stop = start + len(mark)
        while following := [mark for mark in self.marks if text.startswith(mark, stop)]:
            stop += max(map(len, following))
        return stop


def next_header(prompt: str, tail: str, marks: Sequence[str]) -> str:
    """The header of the next answer at the end of ``tail``, of a template that always writes it (Command R7B)."""
    header = shared_end(prompt, tail)
    starts = [header.find(mark) for mark in marks if mark in header]
    return header[min(starts) :] if starts and len(header) < len(tail) else ""


def between(full: str, header: str, tail: str, text: str) -> Place | None:
    """An answer that stands as it is, or but for blanks around it, between ``header`` and ``tail``."""
    stop = len(full) - len(tail)
    if stop < len(header) or not (full.startswith(header) and full.endswith(tail)):
        return None
    for kept in (text, text.strip(), text.rstrip(), text.lstrip()):
        if stop - len(header) == len(kept) and full.startswith(kept, len(header)):
            return Place(len(header), stop, "", None if kept == text else BLANKS_LEFT_OUT)
    return None


def before(full: str, stop: int, text: str) -> Place | None:
    """An answer that stands, whatever the template wrote in front of it, right before ``stop``."""
    for kept in (text, text.strip(), text.rstrip(), text.lstrip()):
        if kept and full.endswith(kept, 0, stop):
            return Place(stop - len(kept), stop, "", None if kept == text else BLANKS_LEFT_OUT)
    return None


def difference(prompt: str, header: str) -> tuple[str, str]:
    """What of ``prompt`` ``header`` does not have, and what it has in that place: whole tags of both."""
    shared = len(shared_beginning(prompt, header))
    if shared < len(prompt):
        opened = prompt.rfind("<", 0, shared)
        if opened > prompt.rfind(">", 0, shared) and ">" in prompt[shared:]:
            shared = opened
    return prompt[shared:], header[shared:]


def starts_otherwise(cut: str, added: str) -> str:
    """The note on a generation prompt that is not how finished conversations go on."""
    return f"generation starts with {shown(cut)}, training " + (f"with {shown(added)}" if added else "does not")


def behind(body: str, cut: str, added: str) -> str:
    """An answer behind a generation prompt that ends with ``cut``: it may open the answer already (`<think>`)."""
    opening = cut.strip()
    if opening and body.startswith(cut):
        return body.removeprefix(cut)
    if opening and body.lstrip().startswith(opening):
        return body.lstrip().removeprefix(opening).lstrip("\n" if cut.endswith("\n") else "")
    return added + body


def special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of the tokenizer's special and added tokens."""
    tokens = {str(token) for token in tokenizer.all_special_tokens}
    tokens |= {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
    return sorted(filter(None, tokens))
