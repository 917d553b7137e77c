"""Amounts of work: what a program launches, computes, moves and sends."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Product:
    """A matrix product ``[m, k] x [k, n]``, ``batch`` times."""

    m: int
    n: int
    k: int
    batch: int = 1
    grouped: bool = False
    """Of several experts in one kernel, ``batch`` of them, with ``m`` rows each in the mean."""
    fp8: bool = False
    """Of FP8 numbers."""

    @property
    def flops(self) -> float:
        """Two operations a multiply-add."""
        return 2.0 * self.batch * self.m * self.n * self.k

    @property
    def elements(self) -> int:
        """Numbers read and written."""
        return self.batch * (self.m * self.k + self.k * self.n + self.m * self.n)


@dataclass
class Work:
    """What one rank executed."""

    products: Counter[Product] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    """Kernels by operator; what a compiler fuses is one, a collective is none."""
    moved: Counter[str] = field(default_factory=Counter)
    """Bytes that kernels read and write, by operator; matrix products and attention left out."""
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Bytes that the rank sends in a ring, by kind of collective and group."""
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Collectives, by kind and group."""
    host_reads: int = 0
    """Values that the host reads back from the device, each of which waits for it."""

    @property
    def flops(self) -> float:
        """FLOPs of all matrix products; attention's scores depend on values and are not in it."""
        return sum(product.flops * times for product, times in self.products.items())

    @property
    def num_kernels(self) -> int:
        """Kernels launched, collectives not counted."""
        return sum(self.kernels.values())

    def send(self, kind: str, group: str, whole: int, size: int, times: int = 1) -> None:
        """Count ``times`` collectives over ``whole`` bytes each in a group of ``size`` ranks (:func:`ring_bytes`)."""
        self.sent[kind, group] += times * ring_bytes(kind, whole, size)
        self.calls[kind, group] += times

    def plus(self, other: Work) -> Work:
        """Both together."""
        return Work(*map(operator.add, vars(self).values(), vars(other).values()))

    def since(self, earlier: Work) -> Work:
        """What came after the snapshot ``earlier``."""
        return Work(*map(operator.sub, vars(self).values(), vars(earlier).values()))

    def times(self, factor: float) -> Work:
        """That much of it."""

        def scaled(amount: Any) -> Any:
            if isinstance(amount, Counter):
                return Counter({name: scaled(number) for name, number in amount.items()})
            return round(amount * factor)

        return Work(*map(scaled, vars(self).values()))


def ring_bytes(kind: str, whole: int, size: int) -> int:
    """Bytes that each of ``size`` ranks sends in a ring, for a collective over ``whole`` bytes.

    Args:
        kind: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all`, `broadcast` or `send`.
        whole: bytes of the tensor that all ranks together hold or get; of an all-to-all, that each rank holds.
        size: ranks of the group.
    """
    if kind == "all-reduce":
        return 2 * whole * (size - 1) // size
    if kind in ("all-gather", "reduce-scatter", "all-to-all"):
        return whole * (size - 1) // size
    return whole
