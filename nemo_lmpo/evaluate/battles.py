"""Arena-Hard's verdicts as numbers: win rate, its published interval, and one over instructions.

Each question is judged twice, with the answers in both orders. Every verdict is a battle against the baseline, and a
verdict of ``>>`` counts as three. Source: the arena-hard-auto repository's scripts and paper (arXiv 2406.11939).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nemo_lmpo.evaluate.bootstrap import SEED, Interval, weighted_means

STRONG = 3
"""Weight of ``>>`` and ``<<``."""
PUBLISHED_ROUNDS = 100

# The last of a text counts; the single brackets only where there are no double ones.
_PATTERNS = (re.compile(r"\[\[([AB<>=]+)\]\]"), re.compile(r"\[([AB<>=]+)\]"))
_SCORES = {
    **{"A>>B": (1.0, STRONG), "A>B": (1.0, 1), "A=B": (0.5, 1), "A<B": (0.0, 1), "A<<B": (0.0, STRONG)},
    **{"B>>A": (0.0, STRONG), "B>A": (0.0, 1), "B=A": (0.5, 1), "B<A": (1.0, 1), "B<<A": (1.0, STRONG)},
}
"""Score of A and weight by verdict."""


def parse_verdict(text: str) -> str | None:
    """The last verdict in a judge's answer, or None."""
    for pattern in _PATTERNS:
        found = [verdict for verdict in pattern.findall(text.upper()) if verdict in _SCORES]
        if found:
            return str(found[-1])
    return None


@dataclass(frozen=True)
class Battles:
    """All battles of a model, as arrays over questions with two games each; a game without a verdict has weight 0."""

    ids: list[str]
    scores: np.ndarray
    """Shape (questions, 2): 1 the model won, 0.5 a tie, 0 the baseline won."""
    weights: np.ndarray
    """Shape (questions, 2)."""

    @property
    def win_rate(self) -> float:
        """Weighted mean in percent. Equal to a Bradley-Terry fit, since every battle is against the baseline."""
        return float(100 * (self.scores * self.weights).sum() / self.weights.sum())

    def by_question(self) -> tuple[np.ndarray, np.ndarray]:
        """Weighted mean score and weight of each question."""
        weight = self.weights.sum(axis=1)
        total = (self.scores * self.weights).sum(axis=1)
        return np.divide(total, weight, out=np.zeros_like(total), where=weight > 0), weight

    def published_interval(self) -> Interval:
        """As published for this version: 100 resamples of battles, 2.5 to 97.5 %.

        Battles of one question are not independent, so it is too narrow.
        """
        expanded = np.repeat(self.scores.ravel(), self.weights.ravel().astype(int))
        random = np.random.default_rng(SEED)
        chosen = random.integers(0, len(expanded), size=(PUBLISHED_ROUNDS, len(expanded)))
        return Interval.of(100 * expanded[chosen].mean(axis=1))

    def question_interval(self) -> Interval:
        """Resampling questions, with both games of each."""
        return Interval.of(self.replicates())

    def replicates(self) -> np.ndarray:
        """Win rates in percent of the resamples that all models share."""
        return 100 * weighted_means(*self.by_question())


def collect_battles(verdicts: Mapping[str, Sequence[str | None]]) -> Battles:
    """Battles from two verdicts a question: in the first game the baseline is A, in the second the model."""
    ids = list(verdicts)
    scores, weights = np.zeros((len(ids), 2)), np.zeros((len(ids), 2))
    for row, games in enumerate(verdicts.values()):
        for game, verdict in enumerate(games):
            if verdict is None:
                continue
            score, weight = _SCORES[verdict]
            scores[row, game] = 1 - score if game == 0 else score
            weights[row, game] = weight
    return Battles(ids, scores, weights)
