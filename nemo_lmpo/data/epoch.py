"""Which pairs an epoch holds: sources behind each other, each as often as its weight says; computed, not listed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemo_lmpo.data.store import Store


@dataclass(frozen=True)
class Share:
    """What an epoch takes of one source: whole copies of its usable pairs, and a part of them once more."""

    store: Store
    usable: np.ndarray | None
    """Places in the store's ``rows`` that may be used, sorted; None: all."""
    copies: int
    part: np.ndarray
    """Which of the usable ones come once more, sorted int32."""

    @property
    def pairs_per_copy(self) -> int:
        """Usable pairs of the source."""
        return self.store.meta.pairs if self.usable is None else len(self.usable)

    def __len__(self) -> int:
        return self.copies * self.pairs_per_copy + len(self.part)

    @property
    def desirable(self) -> int:
        """Answers to learn among the store's answers, as often as they come."""
        labels = self.store.labels() if self.usable is None else self.store.labels()[self.usable]
        return int(self.copies * labels.sum() + labels[self.part].sum())

    def places(self, indices: np.ndarray) -> np.ndarray:
        """Places in the store's ``rows`` of ``indices`` (from 0) of this share."""
        copied = self.copies * self.pairs_per_copy
        places = indices % max(self.pairs_per_copy, 1)
        more = indices >= copied
        places[more] = self.part[indices[more] - copied]
        return places if self.usable is None else self.usable[places]

    def histograms(self) -> list[np.ndarray]:
        """How many prompts, chosen and rejected responses of 0, 1, 2, ... tokens it holds."""
        if self.usable is None and not len(self.part):
            return [self.copies * np.array(counts, dtype=np.int64) for counts in self.store.meta.histograms]
        lengths = self.store.lengths if self.usable is None else self.store.lengths[self.usable]
        size = int(lengths.max(initial=0)) + 1
        return [
            self.copies * np.bincount(lengths[:, part], minlength=size)
            + np.bincount(lengths[self.part, part], minlength=size)
            for part in range(3)
        ]


def share_of(store: Store, weight: float, number: int, usable: np.ndarray | None = None) -> Share:
    """``weight`` times the pairs of the ``number``-th source: a fixed random part of them where it is not whole."""
    count = store.meta.pairs if usable is None else len(usable)
    copies, rest = divmod(weight, 1.0)
    taken = round(rest * count)
    part = np.empty(0, dtype=np.int32)
    if taken:
        keys = np.random.PCG64(np.random.SeedSequence([number, count])).random_raw(count)
        part = np.sort(np.argsort(keys, kind="stable")[:taken]).astype(np.int32)
    return Share(store, usable, int(copies), part)


class Epoch:
    """The pairs of all shares, by index."""

    def __init__(self, shares: Sequence[Share]) -> None:
        self.shares = list(shares)
        self._ends = np.cumsum([len(share) for share in shares])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def sources(self, indices: np.ndarray) -> np.ndarray:
        """Each index's source, as its number."""
        return np.searchsorted(self._ends, indices, side="right")

    def locate(self, index: int) -> tuple[int, int]:
        """The source's number and the row of its table."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        source = int(self.sources(np.array(index)))
        share = self.shares[source]
        place = share.places(np.array([index - (self._ends[source] - len(share))]))[0]
        return source, int(share.store.rows[place])

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of prompt, chosen and rejected, ``[..., 3]`` int64."""
        sources = self.sources(indices)
        found = np.empty((*indices.shape, 3), dtype=np.int64)
        for source, share in enumerate(self.shares):
            here = sources == source
            places = share.places(indices[here] - (self._ends[source] - len(share)))
            found[here] = share.store.lengths[places]
        return found


class Lengths:
    """Tokens of prompt, chosen and rejected of each example: an ``[N, 3]`` array that is looked up, not held.

    Where examples have one response, the last column is 0.

    Index it as an array's first axis; ``numpy.asarray`` gives the whole.
    """

    def __init__(self, epoch: Epoch, num_responses: int = 2) -> None:
        self._epoch = epoch
        self._num_responses = num_responses

    def __len__(self) -> int:
        return len(self._epoch)

    def __getitem__(self, indices: int | slice | np.ndarray | Sequence[int]) -> np.ndarray:
        if isinstance(indices, slice):
            indices = np.arange(*indices.indices(len(self)))
        found = self._epoch.lengths(np.asarray(indices, dtype=np.int64))
        found[..., 1 + self._num_responses :] = 0
        return found

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or np.int64)
