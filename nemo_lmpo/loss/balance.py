"""Whether good and bad answers weigh alike in a loss that judges single answers; imports no torch."""

from __future__ import annotations

from nemo_lmpo.loss.options import KTOConfig

LEAST, MOST = 1.0, 4 / 3
"""What the desirable answers together should weigh for each that the undesirable ones do (KTO's paper, Eq. 8)."""


def weights_advice(desirable: int, undesirable: int, config: KTOConfig) -> str | None:
    """What to say of data with so many answers of each label; None: their weights are as KTO's authors advise."""
    if not desirable or not undesirable:
        there, missing = ("undesirable", "desirable") if undesirable else ("desirable", "undesirable")
        return (
            f"all answers are {there}, and loss=kto learns from what sets {there} answers apart from {missing} ones; "
            "add some, or look at the labels"
        )
    ratio = config.desirable_weight * desirable / (config.undesirable_weight * undesirable)
    if LEAST * (1 - 1e-9) <= ratio <= MOST * (1 + 1e-9):
        return None
    good, bad = config.desirable_weight, config.undesirable_weight
    even, other = undesirable * bad / desirable, desirable * good / undesirable
    return (
        f"{desirable} desirable and {undesirable} undesirable answers, with loss.desirable_weight={good:g} and "
        f"loss.undesirable_weight={bad:g}: the desirable ones together weigh {ratio:.3g} times what the others do, and "
        f"KTO's authors advise 1 to 4/3; set loss.desirable_weight between {even * LEAST:.3g} and {even * MOST:.3g}, "
        f"or loss.undesirable_weight between {other / MOST:.3g} and {other / LEAST:.3g}"
    )
