"""Examples as text, for people to look at: what is predicted stands between marks, or in colour on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_lmpo.data.example import Example
from nemo_lmpo.data.messages import Message, text_of
from nemo_lmpo.data.schema import ConversationRow, PreferenceRow, Row
from nemo_lmpo.errors import printable, printable_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"
_Piece = tuple[str, bool]
"""A text, and whether it is predicted."""


def example_text(example: Example, tokenizer: PreTrainedTokenizerBase, *, colour: bool = False) -> str:
    """An example as the model sees it, decoded; what is predicted stands between `>>>` and `<<<`, or is green."""
    if len(example.responses) == 1:
        return _conversation(example, tokenizer, colour)
    return _pair(example, tokenizer, colour)


def row_text(row: Row, *, colour: bool = False) -> str:
    """A row before any template: who says what, the assistant's part marked as in :func:`example_text`."""
    if isinstance(row, PreferenceRow):
        sides = {"chosen": row.chosen_message, "rejected": row.rejected_message}
        parts = [f"prompt:\n{_laid([(_said(row.prompt), False)], colour)}"]
        parts += [f"{name}:\n{_laid([(_said([message]), True)], colour)}" for name, message in sides.items()]
        return "\n".join([f"pair {_legend('responses stand', colour)}", *parts])
    messages = row.messages if isinstance(row, ConversationRow) else [*row.prompt, row.answer]
    kind = "conversation" if isinstance(row, ConversationRow) else f"answer with the label {str(row.label).lower()}"
    first = row.prompt_messages if isinstance(row, ConversationRow) else len(row.prompt)
    pieces: list[_Piece] = []
    for place, message in enumerate(messages):
        pieces += [(_said([message]), message["role"] == "assistant" and place >= first), ("\n", False)]
    return f"{kind} {_legend('what is predicted stands', colour)}\n{_laid(pieces[:-1], colour)}"


def _said(messages: Sequence[Message]) -> str:
    return "\n".join(f"[{message['role']}] {text_of(message)}" for message in messages)


def _pair(pair: Example, tokenizer: PreTrainedTokenizerBase, colour: bool) -> str:
    chosen, rejected = (response.ids for response in pair.responses)
    lines = [f"pair {printable(pair.example_id, 80)} {_legend('responses stand', colour)}"]
    for name, ids in {"prompt": pair.prompt_ids, "chosen": chosen, "rejected": rejected}.items():
        lines.append(f"{name}, {len(ids)} tokens:\n{_laid([(_decoded(tokenizer, ids), name != 'prompt')], colour)}")
    return "\n".join(lines)


def _conversation(conversation: Example, tokenizer: PreTrainedTokenizerBase, colour: bool) -> str:
    (response,) = conversation.responses
    pieces, behind = [(_decoded(tokenizer, conversation.prompt_ids), False)], 0
    for start, stop in response.spans or ((0, len(response.ids)),):
        pieces.append((_decoded(tokenizer, response.ids[behind:start]), False))
        pieces.append((_decoded(tokenizer, response.ids[start:stop]), True))
        behind = stop
    label = conversation.desirable
    what = "conversation" if label is None else f"answer with the label {str(label).lower()}"
    total = len(conversation.prompt_ids) + len(response.ids)
    return (
        f"{what} {printable(conversation.example_id, 80)} {_legend('what is predicted stands', colour)}\n"
        f"{total} tokens, {response.predicted} of them predicted:\n{_laid(pieces, colour)}"
    )


def _legend(what: str, colour: bool) -> str:
    return f"({what.rpartition(' ')[0]} green)" if colour else f"({what} between >>> and <<<)"


def _laid(pieces: Sequence[_Piece], colour: bool) -> str:
    """Pieces behind each other, indented; nothing of them can act on the terminal."""
    before, behind = (_GREEN, _PLAIN) if colour else (">>>", "<<<")
    whole = ""
    for text, predicted in pieces:
        shown = printable_lines(text)
        whole += f"{before}{shown}{behind}" if predicted else shown
    return "\n".join(f"  {line}" for line in whole.split("\n"))


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
