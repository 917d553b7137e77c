"""Arena-Hard's win rate and intervals against independent computations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import minimize

from nemo_lmpo.evaluate.battles import collect_battles, parse_verdict

VERDICTS = ("A>>B", "A>B", "A=B", "B>A", "B>>A", None)


def bradley_terry(scores: list[float]) -> float:
    """Win rate in percent of a two-player Bradley-Terry fit by maximum likelihood; 0.5 is half a win each."""

    def loss(strength: np.ndarray) -> float:
        win = 1 / (1 + math.exp(-float(strength[0])))
        return -sum(score * math.log(win) + (1 - score) * math.log(1 - win) for score in scores)

    found = minimize(loss, np.zeros(1), method="BFGS", options={"gtol": 1e-9})
    return 100 / (1 + math.exp(-float(found.x[0])))


def random_verdicts(count: int, seed: int = 0) -> dict[str, list[str | None]]:
    random = np.random.default_rng(seed)
    return {f"q{index}": [VERDICTS[random.integers(6)] for _ in range(2)] for index in range(count)}


def test_win_rate_is_the_bradley_terry_fit_of_expanded_battles() -> None:
    verdicts = random_verdicts(80)
    # In the first game A is the baseline. By hand: what the model got, and how often the battle counts.
    first: dict[str | None, list[float]] = {
        "A>>B": [0] * 3,
        "A>B": [0],
        "A=B": [0.5],
        "B>A": [1],
        "B>>A": [1] * 3,
        None: [],
    }
    second = {name: [1 - score for score in scores] for name, scores in first.items()}
    scores = [*itertools.chain.from_iterable(first[one] + second[two] for one, two in verdicts.values())]
    assert collect_battles(verdicts).win_rate == pytest.approx(bradley_terry(scores), abs=1e-4)
    assert collect_battles(verdicts).win_rate == pytest.approx(100 * sum(scores) / len(scores))


def test_orders_cancel_for_a_judge_that_prefers_a_place() -> None:
    assert collect_battles({"q": ["A>>B", "A>>B"], "r": ["A>B", "A>B"]}).win_rate == 50


def test_published_interval_matches_the_theory_of_independent_battles() -> None:
    verdicts = {f"q{index}": ["A>B" if index % 4 else "B>A"] * 2 for index in range(400)}
    battles = collect_battles(verdicts)  # in each question one game is won and one lost
    low, high = (lambda found: (found.low, found.high))(battles.published_interval())
    expected = 2 * 1.96 * 100 * math.sqrt(0.25 / 800)
    assert high - low == pytest.approx(expected, rel=0.2)  # 100 rounds only, as published


def test_questions_make_a_wider_interval_where_games_agree() -> None:
    verdicts = {f"q{index}": ["B>A", "A>B"] if index % 2 else ["A>B", "B>A"] for index in range(300)}
    battles = collect_battles(verdicts)  # the model wins or loses both games of a question
    found = battles.question_interval()
    assert found.high - found.low == pytest.approx(2 * 1.96 * 100 * math.sqrt(0.25 / 300), rel=0.1)
    assert (found.high - found.low) / (battles.published_interval().high - battles.published_interval().low) > 1.2


def test_games_without_verdict_have_no_weight() -> None:
    battles = collect_battles({"q": [None, "A>B"], "r": [None, None]})
    assert battles.win_rate == 100
    means, weights = battles.by_question()
    assert weights.tolist() == [1, 0]
    assert means.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("My final verdict is tie: [[A=B]]", "A=B"),
        ("First I thought [[A>B]]. No: [[b>>a]]", "B>>A"),
        ("verdict [A>B]", "A>B"),
        ("[[A>B>C]]", None),
        ("Assistant A is better", None),
        ("", None),
        ("[[A<<B]]", "A<<B"),
    ],
)
def test_verdicts_in_texts(text: str, verdict: str | None) -> None:
    assert parse_verdict(text) == verdict
