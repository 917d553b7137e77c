"""The part of a score that length explains, taken out by a regression over the candidates of all prompts.

AlpacaEval's length-controlled win rate fits the preference as a model's quality, plus ``tanh`` of a normalised length
difference, plus the instruction's difficulty, and then leaves the length term out (Dubois et al., arXiv 2404.04475).
Scores allow the same in closed form. For candidate i of prompt x with n_x candidates::

    s_xi = a_x + theta * g_xi + e_xi,    g_xi = tanh((l_xi - mean_x l) / sigma)

``a_x`` is the prompt's own level. It takes up all that candidates of a prompt share, so that prompts whose answers are
long and good (or long and bad) as a whole say nothing about theta: only differences within a prompt do. Least squares
with a free ``a_x`` is least squares on values less their mean over the prompt (the Frisch-Waugh-Lovell theorem)::

    theta = sum (g_xi - mean_x g) (s_xi - mean_x s) / sum (g_xi - mean_x g)^2

and the controlled score is ``s_xi - theta * (g_xi - mean_x g)``. Within prompts it is uncorrelated with g, exactly, and
a prompt's mean score stays. ``sigma`` is the mean absolute difference of a length from its prompt's mean, over all
candidates, and ``tanh`` levels off: so a few answers of thousands of tokens decide neither sigma nor theta.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LENGTHS, SCORES = 0, 1


@dataclass(frozen=True)
class LengthControl:
    """A fitted regression."""

    theta: float
    """Score that an answer gains as it goes from its prompt's mean length to very long."""
    sigma: float
    """Tokens."""

    def removed(self, lengths: Sequence[float]) -> np.ndarray:
        """What is taken off the scores of one prompt's candidates, ``[n]``."""
        return self.theta * _regressor(np.asarray(lengths, dtype=float), self.sigma)


def fit(prompts: Sequence[tuple[Sequence[float], Sequence[float]]]) -> LengthControl:
    """Fit the regression.

    Args:
        prompts: lengths in tokens and scores of each prompt's candidates, two or more of each.

    Returns:
        With theta 0 where no prompt has answers of different length.
    """
    deviations = [_centered(lengths) for lengths, _ in prompts]
    count = sum(map(len, deviations))
    sigma = sum(float(np.abs(one).sum()) for one in deviations) / count if count else 0.0
    if sigma == 0.0:
        return LengthControl(0.0, 0.0)
    product = square = 0.0
    for lengths, scores in prompts:
        regressor = _regressor(np.asarray(lengths, dtype=float), sigma)
        product += float(regressor @ _centered(scores))
        square += float(regressor @ regressor)
    return LengthControl(product / square, sigma)


def _centered(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    centered: np.ndarray = array - array.mean()
    return centered


def _regressor(lengths: np.ndarray, sigma: float) -> np.ndarray:
    if sigma == 0.0:
        return np.zeros(len(lengths))
    return _centered(np.tanh((lengths - lengths.mean()) / sigma).tolist())


def within_correlation(prompts: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float | None:
    """Pearson's correlation of length and score over all candidates, each less its prompt's mean.

    None where lengths or scores do not differ within any prompt.
    """
    if not prompts:
        return None
    lengths = np.concatenate([_centered(one[LENGTHS]) for one in prompts])
    scores = np.concatenate([_centered(one[SCORES]) for one in prompts])
    scale = math.sqrt(float(lengths @ lengths) * float(scores @ scores))
    # Sums of rounding errors are not a correlation.
    smallest = 1e-12 * max(1.0, float(np.abs(scores).max(initial=0.0))) * len(scores)
    return float(lengths @ scores) / scale if scale > smallest else None
