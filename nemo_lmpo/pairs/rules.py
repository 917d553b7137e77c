"""Which of a prompt's candidates become a pair: best against worst, or another rule, within limits on lengths."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

from nemo_lmpo.errors import ConfigError, shown
from nemo_lmpo.pairs.candidate import Candidate

BEST_WORST, BEST_RANDOM, MARGIN, TOP_K = "best-worst", "best-random", "margin", "top-k"
RULES = (BEST_WORST, BEST_RANDOM, f"{MARGIN}:X", f"{TOP_K}:K")
EQUAL_SCORES, TOO_UNEQUAL, SMALL_MARGIN = (
    "all scores equal",
    "no pair within --max-length-ratio",
    "score difference below the margin",
)
"""Why a prompt with candidates gives no pair."""

ChosenPair = tuple[Candidate, Candidate]
"""Chosen and rejected."""


@dataclass(frozen=True)
class Rule:
    """How pairs are chosen."""

    kind: str = BEST_WORST
    number: float = 0.0
    """X of `margin:X`, K of `top-k:K`."""
    max_length_ratio: float | None = None
    """Tokens of a pair's longer answer over those of its shorter one, at most."""
    seed: int = 42
    """Of `best-random`."""

    @property
    def text(self) -> str:
        """As it is given on the command line."""
        return f"{self.kind}:{self.number:g}" if self.kind in (MARGIN, TOP_K) else self.kind

    def pairs(self, prompt: str, candidates: Sequence[Candidate]) -> tuple[list[ChosenPair], str | None]:
        """Pairs of a prompt's candidates, or why there is none.

        A pair has two different scores. Where scores are controlled for length, the scores before must differ, too: of
        two answers that were judged equal, the shorter one is not better.

        Args:
            prompt: its id, which the random rule depends on.
            candidates: with different texts and a finite score each.
        """
        ordered = list(permutations(candidates, 2))
        better = [(one, other) for one, other in ordered if one.value > other.value and one.score != other.score]
        if not better:
            return [], EQUAL_SCORES
        allowed = [pair for pair in better if self._fits(pair)]
        if not allowed:
            return [], TOO_UNEQUAL
        found = _KINDS[self.kind](self, prompt, candidates, allowed)
        return found, None if found else SMALL_MARGIN

    def _fits(self, pair: ChosenPair) -> bool:
        shorter, longer = sorted(candidate.tokens for candidate in pair)
        return self.max_length_ratio is None or longer <= self.max_length_ratio * shorter


def parse_rule(text: str, max_length_ratio: float | None, seed: int) -> Rule:
    """The rule that the options name.

    Raises:
        ConfigError: there is no such rule, or its number means nothing.
    """
    kind, colon, given = text.partition(":")
    known = {rule.partition(":")[0]: ":" in rule for rule in RULES}
    if known.get(kind) is not bool(colon):
        raise ConfigError(f"--rule {shown(text)} is not a rule; give one of {', '.join(RULES)}")
    if max_length_ratio is not None and not (1 <= max_length_ratio < math.inf):
        raise ConfigError(f"--max-length-ratio {max_length_ratio} must be at least 1; leave it out for no limit")
    return Rule(kind, _number(text, kind, given) if colon else 0.0, max_length_ratio, seed)


def _number(text: str, kind: str, given: str) -> float:
    try:
        number = float(given)
    except ValueError:
        number = math.nan
    whole = kind == TOP_K
    if not math.isfinite(number) or number <= 0 or (whole and number != int(number)):
        what = "a whole number of pairs, at least 1" if whole else "a score difference above 0"
        raise ConfigError(f"--rule {shown(text)} needs {what} behind the colon")
    return number


def _difference(pair: ChosenPair) -> float:
    return pair[0].value - pair[1].value


def _best_worst(
    rule: Rule, prompt: str, candidates: Sequence[Candidate], allowed: Sequence[ChosenPair]
) -> list[ChosenPair]:
    """The largest difference; of equal ones the first in the order of candidates."""
    return [max(allowed, key=_difference)]


def _margin(
    rule: Rule, prompt: str, candidates: Sequence[Candidate], allowed: Sequence[ChosenPair]
) -> list[ChosenPair]:
    return [pair for pair in _best_worst(rule, prompt, candidates, allowed) if _difference(pair) >= rule.number]


def _best_random(
    rule: Rule, prompt: str, candidates: Sequence[Candidate], allowed: Sequence[ChosenPair]
) -> list[ChosenPair]:
    """The best candidate of any allowed pair, against one of those that it may meet."""
    chosen = max((pair[0] for pair in allowed), key=lambda candidate: candidate.value)
    against = [pair for pair in allowed if pair[0] is chosen]
    return [random.Random(f"{rule.seed}/{prompt}").choice(against)]


def _top_k(rule: Rule, prompt: str, candidates: Sequence[Candidate], allowed: Sequence[ChosenPair]) -> list[ChosenPair]:
    """The best against the worst, the second best against the second worst, and so on: up to K pairs."""
    order = sorted(candidates, key=lambda candidate: candidate.value, reverse=True)
    wanted = ((order[place], order[-1 - place]) for place in range(len(order) // 2))
    may = {(one.name, other.name) for one, other in allowed}
    return list(_first(int(rule.number), (pair for pair in wanted if (pair[0].name, pair[1].name) in may)))


def _first(count: int, pairs: Iterator[ChosenPair]) -> Iterator[ChosenPair]:
    for _, pair in zip(range(count), pairs, strict=False):
        yield pair


_KINDS: dict[str, Callable[[Rule, str, Sequence[Candidate], Sequence[ChosenPair]], list[ChosenPair]]] = {
    BEST_WORST: _best_worst,
    BEST_RANDOM: _best_random,
    MARGIN: _margin,
    TOP_K: _top_k,
}
