"""What a difference says about a claim: one rule for the comparisons and for the tables."""

from __future__ import annotations

from nemo_lmpo.evaluate.bootstrap import Interval

SHOWN, CONTRADICTED, UNDECIDED = "shown", "contradicted", "undecided"
NO_DIFFERENCE, NOT_MEASURED = "no difference", "not measured"


def verdict_of(interval: Interval | None) -> str:
    """Whether what is claimed to be larger is: by the 95 % interval of the difference, larger less smaller.

    Args:
        interval: of the difference; None: it was not measured.

    Returns:
        :data:`SHOWN` where the interval lies above zero, :data:`CONTRADICTED` below, :data:`UNDECIDED` where
        it holds zero, :data:`NOT_MEASURED` without one.
    """
    if interval is None:
        return NOT_MEASURED
    if interval.low > 0:
        return SHOWN
    return CONTRADICTED if interval.high < 0 else UNDECIDED
