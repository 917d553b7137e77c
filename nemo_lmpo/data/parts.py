"""The sources of a dataset: what an epoch takes of each, what their examples are, and what there is to say of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_lmpo.config.schema import DataConfig
from nemo_lmpo.data.epoch import Share, share_of
from nemo_lmpo.data.example import ANSWERS, CONVERSATIONS, PAIRS
from nemo_lmpo.data.pack import example_tokens
from nemo_lmpo.data.read import Source
from nemo_lmpo.data.store import PARTS, Store
from nemo_lmpo.data.summary import ANSWER_PARTS, CONVERSATION_PARTS, DataSummary, SourceSummary, length_percentiles
from nemo_lmpo.data.text import FILE_SUFFIXES
from nemo_lmpo.errors import DataError, shown


@dataclass(frozen=True)
class Part:
    """One source in a dataset."""

    source: Source
    key: str
    """Names its pairs in the cache."""
    weight: float
    budget: list[Any] | None
    """Row budget and sharing of prompts, where they left pairs out."""
    share: Share

    def fingerprint(self, content: str) -> list[Any]:
        """What decides the part's pairs and their order, where ``content`` names the source's pairs."""
        return [content, self.weight, self.budget]


def make_part(
    source: Source,
    key: str,
    store: Store,
    place: tuple[float, int],
    config: DataConfig,
    dropped: dict[str, int],
    kind: str,
) -> Part:
    """What a dataset of examples of that kind takes of a source.

    Args:
        source: the source.
        key: names its examples in the cache.
        store: its examples.
        place: its weight, as one of `data.train.weights`, and its number among the sources.
        config: bounds what fits a row.
        dropped: counts of rows that are not used, by reason; those of this source are added.
        kind: what examples are.

    Raises:
        DataError: an example is too long, and `data.on_bad_row` is `error`.
    """
    weight, number = place
    for reason, count in store.meta.dropped.items():
        dropped[reason] = dropped.get(reason, 0) + count
    if kind == ANSWERS:
        store = store.as_answers()
    usable = _within_budget(source, store, config, dropped, kind)
    budget = None if usable is None else [config.row_budget, config.share_prompt]
    return Part(source, key, weight, budget, share_of(store, weight, number, usable))


def first_unusable(parts: Sequence[Part]) -> list[str]:
    """Place and reason of the first row of each source that is not used."""
    found = ((part.source, part.share.store.meta.first_bad) for part in parts)
    return [f"{source.location(bad[0])}: {bad[2]}" for source, bad in found if bad is not None]


def kind_of_examples(field: str, stores: Sequence[Store], wanted: str | None) -> str:
    """What the examples are: answers where any row has a label, conversations where any is one, else pairs.

    Args:
        field: `data.train` or `data.validation`, for messages.
        stores: of all sources.
        wanted: what they have to be; unset: as the rows are.

    Raises:
        DataError: they cannot be.
    """
    labels = any(store.meta.desirable or store.meta.undesirable for store in stores)
    conversations = any(store.meta.conversations for store in stores)
    if labels and conversations:
        raise DataError(
            f"{field}.path holds answers with a label and conversations without one, and no loss trains on both; give "
            "every answer a label, or leave the labels out with columns={label: null}"
        )
    found = ANSWERS if labels else CONVERSATIONS if conversations else PAIRS
    if found not in (PAIRS, wanted) and wanted is not None:
        what = "answers with a label" if labels else found
        raise DataError(f"{field}.path holds {what} and data.train.path {wanted}; give both {what}, or both {wanted}")
    return wanted or found


def _within_budget(
    source: Source, store: Store, config: DataConfig, dropped: dict[str, int], kind: str
) -> np.ndarray | None:
    """Places in the store's rows whose examples fit a packed row on their own; None: all."""
    budget = config.row_budget
    if store.meta.max_tokens[0 if config.share_prompt else 1] <= budget:
        return None
    lengths = np.array(store.lengths)
    if kind != PAIRS:
        lengths[:, 2] = 0
    costs = example_tokens(lengths, config.share_prompt)
    too_long = np.flatnonzero(costs > budget)
    if not len(too_long):
        return None
    if config.on_bad_row == "error":
        first = int(too_long[0])
        name = shown(store.example_id(int(store.rows[first])))
        raise DataError(
            f"{source.name}: {kind[:-1]} {name} takes {int(costs[first])} tokens, "
            f"more than data.row_tokens={budget}; raise it (2 * data.max_length always suffices), "
            "lower data.max_length, or set data.on_bad_row=skip"
        )
    dropped["longer than data.row_tokens"] = dropped.get("longer than data.row_tokens", 0) + len(too_long)
    return np.flatnonzero(costs <= budget).astype(np.int32)


def source_names(short_names: Sequence[str]) -> list[str]:
    """A name for each source that can stand in a metric's name: the last part of its own, made unique by a number."""
    names: list[str] = []
    for short in short_names:
        stem = short.rsplit("/", 1)[-1]
        while Path(stem).suffix.lower() in FILE_SUFFIXES:
            stem = Path(stem).stem
        name = re.sub(r"[^\w.\-]+", "_", stem)
        number = sum(name == known or known.startswith(f"{name}_") for known in names)
        names.append(name if name not in names else f"{name}_{number + 1}")
    return names


def summarise(parts: Sequence[Part], name: str, dropped: dict[str, int], max_length: int, kind: str) -> DataSummary:
    """What a run says at start of a dataset of examples of that kind; ``dropped`` counts rows that are not used."""
    metas = [part.share.store.meta for part in parts]
    histograms = [part.share.histograms() for part in parts]
    names: tuple[str, ...] = PARTS
    if kind == ANSWERS:
        names = ANSWER_PARTS
    elif kind == CONVERSATIONS:
        histograms = [[*found[:2], np.array(meta.predicted)] for found, meta in zip(histograms, metas, strict=True)]
        names = CONVERSATION_PARTS
    return DataSummary(
        name=name,
        kind=kind,
        desirable=sum(part.share.desirable for part in parts) if kind == ANSWERS else None,
        pairs=sum(len(part.share) for part in parts),
        sources=[
            SourceSummary(part.source.name, meta.rows_read, meta.pairs, len(part.share))
            for part, meta in zip(parts, metas, strict=True)
        ],
        dropped=dropped,
        max_length=max_length,
        prompts_cut=sum(meta.prompts_cut for meta in metas),
        responses_cut=sum(meta.responses_cut for meta in metas),
        special_tokens=sum(meta.special_tokens for meta in metas),
        notes=_added(meta.notes for meta in metas),
        lost=_added(meta.lost for meta in metas),
        columns=_added(meta.columns for meta in metas),
        length_percentiles=length_percentiles(histograms, names),
    )


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    return sum(map(Counter, counts), Counter())
