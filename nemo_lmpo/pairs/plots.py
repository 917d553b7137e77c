"""The page's pictures: what was preferred by score and by length, and how the two hang together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from nemo_lmpo.pairs import folder as files
from nemo_lmpo.pairs.candidate import Candidate
from nemo_lmpo.pairs.choose import Chosen, Pair
from nemo_lmpo.report.blocks import Figure
from nemo_lmpo.report.plots import ROLES, one_panel

_BINS = 40
_MOST_DOTS = 4000


def figures(chosen: Chosen) -> list[Figure]:
    """All pictures."""
    drawn = [
        (
            "scores",
            "Scores",
            "Scores of the chosen and the rejected answers.",
            _histogram(chosen.pairs, "score", lambda one: one.score or 0.0),
        ),
        (
            "lengths",
            "Lengths",
            "Tokens of the chosen and the rejected answers, by the first model's tokenizer.",
            _histogram(chosen.pairs, "tokens", lambda one: float(one.tokens)),
        ),
        (
            "length_and_score",
            "Length and score",
            "All candidates that could be in a pair: how much longer than the mean of its prompt each one is, and how "
            "much better. A slope is what length explains.",
            _scatter(chosen.scored),
        ),
    ]
    return [Figure(title, caption, png, f"{files.FIGURES}/{name}.png") for name, title, caption, png in drawn]


def _histogram(pairs: Sequence[Pair], xlabel: str, value: Any) -> bytes:
    values = {
        "chosen": [value(pair.chosen) for pair in pairs],
        "rejected": [value(pair.rejected) for pair in pairs],
    }
    edges = np.histogram_bin_edges(np.concatenate([np.asarray(one, dtype=float) for one in values.values()]), _BINS)

    def draw(axes: Any) -> None:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
        for role, found in values.items():
            counts, _ = np.histogram(found, edges)
            axes.stairs(counts, edges, color=ROLES[role], linewidth=1.6, label=role, zorder=3)
            axes.stairs(counts, edges, color=ROLES[role], alpha=0.15, fill=True, zorder=2)

    return one_panel("pairs", draw, xlabel=xlabel)


def _scatter(scored: Sequence[Sequence[Candidate]]) -> bytes:
    lengths, before, after = _centered(scored)
    # The same dots at every call: every so many-th one.
    kept = slice(None, None, max(1, -(-len(lengths) // _MOST_DOTS)))
    controlled = any(one.controlled is not None for them in scored for one in them)

    def draw(axes: Any) -> None:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
        marks: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 2.4, "alpha": 0.45, "zorder": 3}
        axes.plot(lengths[kept], before[kept], color=ROLES["neutral"], label="score", **marks)
        if controlled:
            label = "score, length controlled"
            axes.plot(lengths[kept], after[kept], color=ROLES["margin"], label=label, **marks)

    return one_panel("score less its prompt's mean", draw, xlabel="tokens less their prompt's mean", from_zero=False)


def _centered(scored: Sequence[Sequence[Candidate]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    columns: list[list[float]] = [[], [], []]
    for them in scored:
        for column, values in zip(
            columns,
            ([one.tokens for one in them], [one.score or 0.0 for one in them], [one.value for one in them]),
            strict=True,
        ):
            array = np.asarray(values, dtype=float)
            column += (array - array.mean()).tolist()
    lengths, before, after = (np.asarray(column) for column in columns)
    return lengths, before, after
