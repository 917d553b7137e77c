"""Conversations as token ids, with the spans that are predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from nemo_lmpo.data.messages import RowError
from nemo_lmpo.data.schema import ConversationRow
from nemo_lmpo.data.turns import ConversationFormat, RenderedConversation

if TYPE_CHECKING:
    from nemo_lmpo.data.encode import EncodedRow, PairEncoder


@dataclass
class _Growing:
    """A conversation whose pieces become ids one behind the other."""

    rendered: RenderedConversation
    pieces: list[str]
    """The text up to the first span, the span, the text up to the next one, ..."""
    ids: list[list[int]]
    """Of the pieces so far."""

    @property
    def text(self) -> str:
        """The text of the pieces so far."""
        return "".join(self.pieces[: len(self.ids)])


class ConversationEncoder:
    """Tokenizes what the chat template makes of a conversation.

    The ids of each piece are those that it has behind the pieces before it, as a pair's response has behind its prompt:
    together they are the tokenization of the whole wherever no token reaches over the border of a span.

    Args:
        encoder: of pairs, with the same tokenizer, template and lengths.
        predict: as `data.predict`.
    """

    def __init__(self, encoder: PairEncoder, predict: str) -> None:
        self._encoder = encoder
        self._format = ConversationFormat(encoder.chat, predict)

    def encode(self, rows: Sequence[ConversationRow]) -> list[EncodedRow | RowError]:
        """Token ids of each row, or why it cannot be used."""
        special = self._encoder.special_tokens
        checked = [special.checked(row) for row in rows]
        rendered = iter(self._format.render([row for row in checked if isinstance(row, ConversationRow)]))
        results = [row if isinstance(row, RowError) else next(rendered) for row in checked]
        growing = [_in_pieces(found) for found in results if not isinstance(found, RowError)]
        self._tokenize(growing)
        grown = iter(growing)
        return [
            result if isinstance(result, RowError) else self._row(next(grown), special.found_in(row) is not None)
            for row, result in zip(rows, results, strict=True)
        ]

    def _tokenize(self, growing: list[_Growing]) -> None:
        """Ids of all pieces, a place of all conversations at a time; nothing behind what may be kept."""
        for one, ids in zip(growing, self._encoder.beginnings([one.pieces[0] for one in growing]), strict=True):
            one.ids.append(ids)
        most = self._encoder.max_length + self._encoder.max_prompt_length
        while True:
            unfinished = [
                one for one in growing if len(one.ids) < len(one.pieces) and sum(map(len, one.ids[1:])) <= most
            ]
            if not unfinished:
                return
            known = [[token for ids in one.ids for token in ids] for one in unfinished]
            added = self._encoder.continuations(
                [one.text for one in unfinished], known, [one.pieces[len(one.ids)] for one in unfinished]
            )
            for one, ids in zip(unfinished, added, strict=True):
                one.ids.append(ids)

    def _row(self, grown: _Growing, special: bool) -> EncodedRow | RowError:
        prompt, *pieces = grown.ids
        finished = len(grown.ids) == len(grown.pieces)
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for number, piece in enumerate(pieces):
            if number % 2 == 0:
                piece = self._encoder.ended(piece, last=finished and number == len(pieces) - 1)
                spans.append((len(ids), len(ids) + len(piece)))
            ids += piece
        prompt = self._encoder.with_one_bos(prompt)
        if not prompt and ids:  # nothing could predict the first token
            prompt, ids = ids[:1], ids[1:]
            spans = [(max(start - 1, 0), stop - 1) for start, stop in spans]
        notes, lost = grown.rendered.notes, grown.rendered.lost
        return self._encoder.bounded_conversation(prompt, ids, spans, special, notes, lost)


def _in_pieces(rendered: RenderedConversation) -> _Growing:
    borders = [0, *(border for span in rendered.spans for border in span)]
    pieces = [rendered.text[start:stop] for start, stop in pairwise(borders)]
    return _Growing(rendered, pieces, [])
