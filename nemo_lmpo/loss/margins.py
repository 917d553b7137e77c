"""Margin functions of LMPO: Eq. 7 and the variants of the paper's ablation (Section 4.2, Table 2).

``p_w``, ``p_l`` are length-normalised probabilities ``[B]`` in ``[0, 1]`` and ``delta = p_w - p_l``.

Two sets exist. The paper prints "log" and "cube" with a plus between the two factors; the authors' trainers
(github.com/gengxuli/LMPO, its history: ``scripts/simpo_trainer_loss4-2_{log,tri,sigmoid}.py``) multiply, and
halve where the factor ranges over ``[0, 2]``. ``alpha`` and ``beta_s`` are in no table of the paper; the
defaults 5 and 0.1 are the constants of those trainers.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEFAULT_ALPHA = 5.0
"""`k` in the authors' `simpo_trainer_loss4-2_log.py`."""

DEFAULT_BETA_S = 0.1
"""`k` in the authors' `simpo_trainer_loss4-2_sigmoid.py`."""

LOG_MARGIN_CLAMP = 1e-6
"""The log margin is singular at ``delta = +-1``. ``delta`` is kept this far from there, where the logarithm is
+-14.5 and its gradient at most 1e6 / alpha; beyond, the margin is constant and has no gradient."""

_RELEASED_EPSILON = 1e-8
"""What the authors' log margin adds to numerator and denominator."""


def paper_margin(kind: str, p_w: Tensor, p_l: Tensor, alpha: float, beta_s: float) -> Tensor:
    """The margin ``m`` as the paper prints it, ``[B]``.

    - ``power5`` (Eq. 7): ``(1 - p_w) * (1 - delta^5)``
    - ``cube``: ``(1 - p_w) + (1 - delta^3)``
    - ``log``: ``(1 - p_w) + (log((1 - delta) / (1 + delta)) / alpha + 0.5)``, ``delta`` clamped
    - ``sigmoid``: ``(1 - p_w) / (1 + exp(delta / beta_s))``
    """
    delta = p_w - p_l
    if kind == "power5":
        return (1 - p_w) * (1 - delta**5)
    if kind == "cube":
        return (1 - p_w) + (1 - delta**3)
    if kind == "log":
        delta = delta.clamp(-1 + LOG_MARGIN_CLAMP, 1 - LOG_MARGIN_CLAMP)
        return (1 - p_w) + ((torch.log1p(-delta) - torch.log1p(delta)) / alpha + 0.5)
    if kind == "sigmoid":
        return (1 - p_w) * torch.sigmoid(-delta / beta_s)
    raise AssertionError(f"unvalidated margin {kind!r}")


def released_margin(kind: str, p_w: Tensor, p_l: Tensor, alpha: float, beta_s: float) -> Tensor:
    """The margin ``m`` as the authors' trainers compute it, ``[B]``: products, polynomials halved."""
    delta = p_w - p_l
    if kind == "power5":
        return (1 - p_w) * (1 - delta**5) / 2
    if kind == "cube":
        return (1 - p_w) * (1 - delta**3) / 2
    if kind == "log":
        ratio = (0.5 - delta / 2 + _RELEASED_EPSILON) / (0.5 + delta / 2 + _RELEASED_EPSILON)
        return (1 - p_w) * (torch.log(ratio) / alpha + 0.5)
    if kind == "sigmoid":
        return (1 - p_w) * torch.sigmoid(-delta / beta_s)
    raise AssertionError(f"unvalidated margin {kind!r}")
