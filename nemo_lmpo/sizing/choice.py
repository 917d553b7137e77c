"""What the choice of a layout depends on: where another one becomes the fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from nemo_lmpo.sizing.cards import GIGABIT, Card, Machine
from nemo_lmpo.sizing.search import Candidate
from nemo_lmpo.sizing.uncertainty import COLLECTIVES, COMPUTE, fast_end, slow_end

CONTENDERS = 12
"""Of the fastest layouts as assumed, and of those at the slow and at the fast end."""
RATES = [round(25 * 2 ** (step / 4)) for step in range(25)]
"""Gbit/s a GPU that networks are tried at: 25 to 1,600."""


def contenders(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Layouts that may come out first, fastest as assumed first."""
    orders: list[Callable[[Candidate], float]] = [lambda c: c.time.total, lambda c: c.slow, lambda c: c.fast]
    chosen = {id(each) for order in orders for each in sorted(candidates, key=order)[:CONTENDERS]}
    return [each for each in candidates if id(each) in chosen]


def fastest(candidates: Sequence[Candidate], machine: Machine) -> tuple[Candidate, float]:
    """The first on a machine, and its seconds of a step."""
    times = [(each.time_on(machine).total, place) for place, each in enumerate(candidates)]
    seconds, place = min(times)
    return candidates[place], seconds


def dependence(candidates: Sequence[Candidate], machine: Machine, name: Callable[[Candidate], str]) -> Iterator[str]:
    """A line on each assumption: which layout is first within its range.

    Args:
        candidates: that :func:`contenders` left.
        machine: as assumed.
        name: of a layout.
    """
    if machine.nodes > 1 and machine.gpus > machine.card.joined:
        found = [(rate, name(fastest(candidates, _with(machine, network=rate * GIGABIT))[0])) for rate in RATES]
        spans = [(layout, [rate for rate, _ in group]) for layout, group in groupby(found, key=lambda entry: entry[1])]
        told = [f"{rates[0]:,} to {rates[-1]:,}: {layout}" for layout, rates in spans]
        yield "network, Gbit/s a GPU: " + "; ".join(told)
    card = machine.card
    for what, variants in (
        (
            f"products and attention at {100 * COMPUTE[0]:.0f} to {100 * COMPUTE[1]:.0f} % of the assumed speed",
            [_with(machine, products=card.products * f, attention=card.attention * f) for f in COMPUTE],
        ),
        (
            f"collectives at {100 * COLLECTIVES[0]:.0f} to {100 * COLLECTIVES[1]:.0f} % of their links' rate",
            [_with(machine, collectives=share) for share in COLLECTIVES],
        ),
        ("all at the slow and at the fast end", [slow_end(machine), fast_end(machine)]),
    ):
        first = [name(fastest(candidates, variant)[0]) for variant in variants]
        usual = name(candidates[0])
        yield f"{what}: " + ("the same" if first == [usual, usual] else f"{first[0]}; {first[1]}")


def _with(machine: Machine, **changes: float) -> Machine:
    card: Card = replace(machine.card, **changes)  # type: ignore[arg-type]
    return replace(machine, card=card)
