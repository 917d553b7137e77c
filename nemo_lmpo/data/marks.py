"""The marks that some chat templates have around what the assistant says, beside the turns that are found anyway."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Span = tuple[int, int]
"""Start and stop in a text."""

MARKS_HOLD_MORE = "the template's {% generation %} marks hold more than answers and their ends (data.predict=marked)"
MARKS_HOLD_LESS = "the template's {% generation %} marks leave out part of the answers (data.predict=marked)"


def differences(text: str, turns: Sequence[Span], marked: Sequence[Span]) -> list[str]:
    """How the marks differ from the turns that are predicted, blanks aside.

    Args:
        text: the rendered conversation.
        turns: what is predicted.
        marked: what the template marks.
    """
    both = ((marked, turns, MARKS_HOLD_MORE), (turns, marked, MARKS_HOLD_LESS))
    return [note for one, other, note in both if any(text[start:stop].strip() for start, stop in _without(one, other))]


def behind(spans: Iterable[Span], start: int) -> list[Span]:
    """The spans, or what of them is not in front of ``start``."""
    return [(max(first, start), stop) for first, stop in spans if stop > start]


def _without(spans: Sequence[Span], holes: Sequence[Span]) -> Iterable[Span]:
    """What of the spans is in none of the holes; both in order."""
    for start, stop in spans:
        for first, last in holes:
            if last <= start or first >= stop:
                continue
            if start < first:
                yield start, first
            start = last
        if start < stop:
            yield start, stop
