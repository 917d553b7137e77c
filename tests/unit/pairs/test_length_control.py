"""The regression against numpy's least squares with a column for each prompt, and against what was planted."""

from __future__ import annotations

import numpy as np
import pytest

from nemo_lmpo.pairs.length_control import fit, within_correlation

Prompts = list[tuple[list[float], list[float]]]


def planted(theta: float, unit: float = 33.0, prompts: int = 200) -> Prompts:
    """Scores of quality, a prompt's own level that grows with its length, and tanh of the length within the prompt."""
    random = np.random.default_rng(5)
    found: Prompts = []
    for _ in range(prompts):
        level = random.normal()
        lengths = np.round(200 + 80 * level + 50 * random.normal(size=int(random.integers(2, 6))))
        term = np.tanh((lengths - lengths.mean()) / unit)
        scores = 3.0 * level + random.normal(scale=0.1, size=len(lengths)) + theta * (term - term.mean())
        found.append((lengths.tolist(), scores.tolist()))
    return found


def by_least_squares(prompts: Prompts, sigma: float) -> float:
    """The same model with one column for each prompt, solved as a whole."""
    rows, values = [], []
    for place, (lengths, scores) in enumerate(prompts):
        for length, score in zip(lengths, scores, strict=True):
            columns = np.zeros(1 + len(prompts))
            columns[0], columns[1 + place] = np.tanh((length - np.mean(lengths)) / sigma), 1.0
            rows.append(columns)
            values.append(score)
    return float(np.linalg.lstsq(np.asarray(rows), np.asarray(values), rcond=None)[0][0])


@pytest.mark.parametrize("theta", [-1.5, 0.0, 0.7])
def test_theta_is_that_of_least_squares_and_what_was_planted(theta: float) -> None:
    prompts = planted(theta)
    control = fit(prompts)
    assert control.theta == pytest.approx(by_least_squares(prompts, control.sigma), abs=1e-10)
    assert control.sigma == pytest.approx(33, abs=3)
    # 0.1 of noise over 700 candidates, four standard deviations.
    assert fit(planted(theta, unit=control.sigma)).theta == pytest.approx(theta, abs=0.03)


def test_difficulty_does_not_leak_in() -> None:
    """Prompts with long answers score higher here, which a regression over everything would take for length."""
    prompts = planted(0.0)
    everything = np.polyfit(np.concatenate([p[0] for p in prompts]), np.concatenate([p[1] for p in prompts]), 1)[0]
    assert everything > 0.01  # 3 points of score for 80 tokens, less noise
    assert abs(fit(prompts).theta) < 0.05


def test_what_is_left_is_uncorrelated_and_keeps_the_prompts_mean() -> None:
    prompts = planted(0.7)
    control = fit(prompts)
    left = [(lengths, (np.asarray(scores) - control.removed(lengths)).tolist()) for lengths, scores in prompts]
    regressors = [(np.tanh((np.asarray(one) - np.mean(one)) / control.sigma).tolist(), rest) for one, rest in left]
    assert within_correlation(regressors) == pytest.approx(0.0, abs=1e-9)
    assert within_correlation(prompts) > 0.5
    assert abs(within_correlation(left)) < 0.1
    assert [np.mean(rest) for _, rest in left] == pytest.approx([np.mean(scores) for _, scores in prompts])


def test_one_endless_answer_does_not_decide() -> None:
    prompts = planted(0.7)
    assert fit([*prompts, ([100.0, 4096.0], [5.0, -5.0])]).theta == pytest.approx(fit(prompts).theta, abs=0.1)


def test_lengths_that_do_not_differ_explain_nothing() -> None:
    control = fit([([5.0, 5.0], [1.0, 0.0]), ([7.0, 7.0], [0.0, 3.0])])
    assert control.theta == 0.0
    assert control.removed([5.0, 5.0]).tolist() == [0.0, 0.0]
    assert fit([]).theta == 0.0
    assert within_correlation([([5.0, 5.0], [1.0, 0.0])]) is None
    assert within_correlation([]) is None
    assert within_correlation([([1.0, 2.0], [0.1, 0.1]), ([1.0, 3.0], [0.3, 0.3])]) is None
