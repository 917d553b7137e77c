"""Numbers about pairs: scores, lengths, and how much of a preference length explains."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

from nemo_lmpo.pairs.candidate import Candidate
from nemo_lmpo.pairs.choose import Chosen
from nemo_lmpo.pairs.length_control import within_correlation


def statistics_of(chosen: Chosen) -> dict[str, Any]:
    """What `pairs.json` and the page show; lengths are tokens of the first model's tokenizer."""
    pairs = chosen.pairs
    found: dict[str, Any] = {
        "score_chosen": fmean(_score(pair.chosen) for pair in pairs),
        "score_rejected": fmean(_score(pair.rejected) for pair in pairs),
        "tokens_chosen": fmean(pair.chosen.tokens for pair in pairs),
        "tokens_rejected": fmean(pair.rejected.tokens for pair in pairs),
        "score_candidates": fmean(_score(one) for them in chosen.scored for one in them),
        "tokens_candidates": fmean(one.tokens for them in chosen.scored for one in them),
        "longer_wins_candidates": longer_wins(
            [sides for them in chosen.scored for sides in _by_score(them, controlled=False)]
        ),
        "longer_wins_pairs": longer_wins([(pair.chosen, pair.rejected) for pair in pairs]),
        "correlation_length_score": _correlation(chosen.scored, controlled=False),
    }
    if chosen.control is not None:
        found |= {
            "length_control_theta": chosen.control.theta,
            "length_control_sigma": chosen.control.sigma,
            "correlation_length_controlled_score": _correlation(chosen.scored, controlled=True),
            "longer_wins_candidates_controlled": longer_wins(
                [sides for them in chosen.scored for sides in _by_score(them, controlled=True)]
            ),
        }
    return found


def _score(candidate: Candidate) -> float:
    assert candidate.score is not None
    return candidate.score


def _by_score(candidates: Sequence[Candidate], *, controlled: bool) -> list[tuple[Candidate, Candidate]]:
    """All pairs of a prompt's candidates with different scores, the better one first."""

    def value(one: Candidate) -> float:
        return one.value if controlled else _score(one)

    unequal = [(one, other) for one, other in combinations(candidates, 2) if value(one) != value(other)]
    return [(one, other) if value(one) > value(other) else (other, one) for one, other in unequal]


def longer_wins(sides: Sequence[tuple[Candidate, Candidate]]) -> float | None:
    """In percent, how often the better one is the longer one; of equal length counts as half. None without any."""
    if not sides:
        return None
    wins = (1.0 if one.tokens > other.tokens else 0.5 if one.tokens == other.tokens else 0.0 for one, other in sides)
    return 100 * fmean(wins)


def _correlation(scored: Sequence[Sequence[Candidate]], *, controlled: bool) -> float | None:
    """Within prompts, over all candidates."""
    return within_correlation(
        [
            ([float(one.tokens) for one in them], [one.value if controlled else _score(one) for one in them])
            for them in scored
        ]
    )
