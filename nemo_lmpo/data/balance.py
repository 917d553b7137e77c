"""Evens out the lengths of packed sequences by exchanging pairs."""

from __future__ import annotations

import numpy as np

MOST_EXCHANGES = 200
"""Bounds the work for a step; some tens suffice for hundreds of pairs."""


def even_out(rows: list[list[int]], costs: np.ndarray) -> None:
    """Exchange pairs between the longest sequence and others, in place, as long as that makes it shorter.

    Each exchange takes the pair of pairs that leaves the longer of the two sequences shortest. How many pairs a
    sequence has does not change. The result depends on the arguments only.

    Args:
        rows: for each sequence the positions of its pairs.
        costs: ``[B]`` tokens that each pair takes.
    """
    loads = np.array([costs[row].sum() for row in rows], dtype=np.int64)
    for _ in range(MOST_EXCHANGES):
        longest = int(loads.argmax())
        exchange = _best_exchange(rows, costs, loads, longest)
        if exchange is None:
            return
        ours, other, theirs = exchange
        moved = int(costs[rows[longest][ours]] - costs[rows[other][theirs]])
        rows[longest][ours], rows[other][theirs] = rows[other][theirs], rows[longest][ours]
        loads[longest] -= moved
        loads[other] += moved


def _best_exchange(
    rows: list[list[int]], costs: np.ndarray, loads: np.ndarray, longest: int
) -> tuple[int, int, int] | None:
    """Index in the longest sequence, other sequence, index in it; None if no exchange helps."""
    places = [(other, index) for other, row in enumerate(rows) if other != longest for index in range(len(row))]
    if not places:
        return None
    others = np.array([other for other, _ in places])
    moved = costs[rows[longest]][:, None] - costs[[rows[other][index] for other, index in places]][None]
    longer = np.maximum(loads[longest] - moved, loads[others][None] + moved)
    best = int(longer.argmin())
    if longer.flat[best] >= loads[longest]:
        return None
    ours, place = divmod(best, len(places))
    return ours, *places[place]
