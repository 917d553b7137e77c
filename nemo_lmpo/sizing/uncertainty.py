"""How far a computed time can be off: machines as slow and as fast as the assumptions leave them, and what binds.

Computed speeds of published runs err by 6 % in the median and 16 % at most (docs/performance.md), which is how far
the shares of peaks go to both sides here. The network of a machine of several nodes is the card's usual one or half of
it, unless the user names it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from nemo_lmpo.sizing.cards import Card, Machine

COMPUTE = (0.85, 1.15)
"""Of the assumed share of peaks that products and attention get, at the slow and the fast end."""
MOVED = (0.7, 0.9)
"""Share of the memory's bandwidth that other kernels get."""
COLLECTIVES = (0.6, 0.9)
"""Share of a link's rate that collectives get."""
LAUNCHES = (1.5, 0.75)
"""Of the assumed seconds that the host needs for a kernel."""
NETWORK = (0.5, 1.0)
"""Of the card's usual network."""
SLOWER = 0.8
"""What a resource is slowed down to, to see how much of a step it decides."""


def slow_end(machine: Machine) -> Machine:
    """The machine with everything at its slow end."""
    return _at(machine, 0)


def fast_end(machine: Machine) -> Machine:
    """The machine with everything at its fast end."""
    return _at(machine, 1)


def _at(machine: Machine, end: int) -> Machine:
    card = machine.card
    changed = replace(
        card,
        products=card.products * COMPUTE[end],
        attention=card.attention * COMPUTE[end],
        moved=MOVED[end],
        collectives=COLLECTIVES[end],
        launch=card.launch * LAUNCHES[end],
        network=card.network * (1.0 if machine.network_is_known else NETWORK[end]),
    )
    return replace(machine, card=changed)


@dataclass(frozen=True)
class Resource:
    """Something that a step waits for."""

    name: str
    slowed: Callable[[Card], Card]


RESOURCES = (
    Resource(
        "tensor cores", lambda card: replace(card, products=card.products * SLOWER, attention=card.attention * SLOWER)
    ),
    Resource("memory", lambda card: replace(card, bandwidth=card.bandwidth * SLOWER)),
    Resource("host", lambda card: replace(card, launch=card.launch / SLOWER)),
    Resource("links in a node", lambda card: replace(card, link=card.link * SLOWER)),
    Resource("network", lambda card: replace(card, network=card.network * SLOWER)),
)


def shares(seconds: Callable[[Card], float], card: Card) -> list[tuple[str, float]]:
    """How much of a step each resource decides, the most first: all of it is a step as much slower as the resource.

    What hides behind something else decides nothing until it no longer hides; near that edge it decides much.

    Args:
        seconds: time of a step on a card.
        card: the card as assumed.
    """
    usual, worst = seconds(card), 1 / SLOWER - 1
    found = [(each.name, (seconds(each.slowed(card)) / usual - 1) / worst) for each in RESOURCES]
    return sorted(found, key=lambda entry: -entry[1])
