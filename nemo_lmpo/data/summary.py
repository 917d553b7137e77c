"""What a run says of its data at start."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from nemo_lmpo.errors import printable

PERCENTILES = (50, 90, 99, 100)
MOST_CUT = 0.05
"""Part of the pairs that may be cut to length before it is a warning: more than outliers."""
CONVERSATION_PARTS = ("prompt", "behind it", "predicted")
"""What has a length in a conversation: all before the first answer, all from there on, and what of it is predicted."""
ANSWER_PARTS = ("prompt", "answer")
MOST_COLUMNS = 12
"""Unused columns that are named at most."""


@dataclass(frozen=True)
class SourceSummary:
    """One path: its rows, the pairs they gave, and how many pairs an epoch takes of it."""

    path: str
    rows: int
    pairs: int
    used: int


@dataclass(frozen=True)
class DataSummary:
    """Counts and lengths of one preference dataset."""

    name: str
    """`train` or `validation`."""
    pairs: int
    """Examples in an epoch, repeated ones counted each time."""
    sources: list[SourceSummary]
    kind: str = "pairs"
    """What the examples are: `pairs`, `conversations` or `answers`."""
    desirable: int | None = None
    """Answers with the label true, where all have a label."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows not used, by reason."""
    max_length: int = 0
    """Most tokens of prompt and response together."""
    prompts_cut: int = 0
    """Pairs whose prompt lost its beginning."""
    responses_cut: int = 0
    """Pairs of which at least one response lost its end."""
    special_tokens: int = 0
    """Pairs whose texts hold special tokens of the tokenizer."""
    notes: dict[str, int] = field(default_factory=dict)
    """Pairs by what there is to say of how the chat template lays them."""
    lost: dict[str, int] = field(default_factory=dict)
    """Pairs by what of their rows is not in their ids."""
    columns: dict[str, int] = field(default_factory=dict)
    """Pairs by columns of their rows that nothing uses."""
    length_percentiles: dict[str, dict[int, int]] = field(default_factory=dict)
    """Tokens of `prompt`, `chosen`, `rejected` at the percentiles 50, 90, 99 and 100."""

    def __str__(self) -> str:
        """A few lines for the console."""
        labels = ""
        if self.desirable is not None:
            labels = f" ({self.desirable} desirable, {self.pairs - self.desirable} undesirable)"
        lines = [f"{self.name}: {self.pairs} {self.kind}{labels}"]
        lines += [f"  {printable(s.path)}: {s.rows} rows, {s.pairs} usable, {s.used} in an epoch" for s in self.sources]
        if self.dropped:
            reasons = ", ".join(f"{count} {printable(reason)}" for reason, count in sorted(self.dropped.items()))
            lines.append(f"  dropped: {reasons}")
        lines += self._cut()
        if self.special_tokens:
            lines.append(
                f"  special tokens in the texts of {self.special_tokens} {self.kind}: see data.special_tokens_in_text"
            )
        lines += [f"  warning: {count} {self.kind} lose {printable(name)}" for name, count in sorted(self.lost.items())]
        if self.lost:
            lines.append("    (not in what is trained; data.on_unused_fields=error makes such rows unusable)")
        if self.columns:
            lines.append(f"  columns that nothing uses: {shown_names(self.columns)}")
        lines += [f"  {count} {self.kind}: {printable(note)}" for note, count in sorted(self.notes.items())]
        lines.append("  tokens    " + "".join(f"{'max' if p == 100 else f'{p} %':>8}" for p in PERCENTILES))
        for part, values in self.length_percentiles.items():
            lines.append(f"  {part:<10}" + "".join(f"{values[p]:>8}" for p in PERCENTILES))
        return "\n".join(lines)

    def _cut(self) -> list[str]:
        """What lost text to `data.max_length`: counts, and a warning where it is not only outliers."""
        if not (self.prompts_cut or self.responses_cut):
            return []
        lines = [f"  cut to length: {self.prompts_cut} prompts, responses of {self.responses_cut} {self.kind}"]
        pairs = sum(source.pairs for source in self.sources)
        for count, what in (
            (self.responses_cut, "the end of a response"),
            (self.prompts_cut, "the prompt's beginning"),
        ):
            if count > MOST_CUT * pairs:
                lines.append(
                    f"  warning: {count / pairs:.0%} of the {self.kind} ({count} of {pairs}) lose {what}; raise "
                    f"data.max_length={self.max_length}"
                )
        return lines


def shown_names(names: Iterable[str]) -> str:
    """Names of columns as a message may show them."""
    listed = sorted(names)
    more = f" and {len(listed) - MOST_COLUMNS} more" if len(listed) > MOST_COLUMNS else ""
    return ", ".join(printable(name, 80) for name in listed[:MOST_COLUMNS]) + more


def length_percentiles(
    histograms: Sequence[Sequence[np.ndarray]], names: Sequence[str] = ("prompt", "chosen", "rejected")
) -> dict[str, dict[int, int]]:
    """Percentiles of lengths: values that occur, none interpolated.

    Args:
        histograms: of each source, how many prompts, chosen and rejected responses have 0, 1, 2, ... tokens.
        names: what these are called.
    """
    found = {}
    for part, name in enumerate(names):
        counts = np.zeros(max(len(source[part]) for source in histograms), dtype=np.int64)
        for source in histograms:
            counts[: len(source[part])] += source[part]
        below = np.cumsum(counts)
        # the place of a percentile in the sorted lengths, rounded up
        places = {p: -(-p * (int(below[-1]) - 1) // 100) for p in PERCENTILES}
        found[name] = {p: int(np.searchsorted(below, place, side="right")) for p, place in places.items()}
    return found
