"""Whether all ranks, and a run that resumes, have the settings and the preference pairs that the run began with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nemo_lmpo.checkpoint.agreement import from_all_ranks
from nemo_lmpo.config.schema import Config, may_change
from nemo_lmpo.errors import DataError

SPLITS = ("train", "validation")


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested settings."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def default_settings(config: Config) -> dict[str, Any]:
    """What a setting is worth where a run of an earlier version does not have it: mostly its default.

    A field whose default changes what earlier versions did says so by its metadata ``absent_means``.
    """
    values = dict(flatten(dataclasses.asdict(dataclasses.replace(Config(), loss=type(config.loss)()))))
    for of in dataclasses.fields(config.loss):
        if "absent_means" in of.metadata:
            values[f"loss.{of.name}"] = of.metadata["absent_means"]
    return values


def changed_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Settings that a resumed run must have as before and has not: old and new value by dotted key.

    Settings that came later count as what they are worth without being set, and settings that are gone do not count.
    """
    changes = {}
    for key in sorted(before.keys() | now.keys()):
        if key not in now and key not in defaults and not key.startswith("model.architecture."):
            continue
        old, new = before.get(key, defaults.get(key)), now.get(key, defaults.get(key))
        if old != new and not may_change(key):
            changes[key] = (old, new)
    return changes


def is_admitted(key: str, allowed: Iterable[str]) -> bool:
    """Whether `checkpoint.allow_changes` names a setting or a group that it belongs to."""
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def _path(config: Config, split: str) -> str:
    return f"data.{split}.path={getattr(config.data, split).path}"


def refuse_other_data_on_other_ranks(config: Config, own: Mapping[str, str]) -> None:
    """Compare the pairs' fingerprints over the job; ``own`` has those of this rank by split.

    Communicates: one object all-gather over all ranks.

    Raises:
        DataError: on every rank, if any rank has other pairs than rank 0.
    """
    first, *others = from_all_ranks(dict(own))
    for rank, found in enumerate(others, 1):
        for split in SPLITS:
            if found.get(split) != first.get(split):
                raise DataError(
                    f"{_path(config, split)} holds other pairs on rank {rank} ({found.get(split)}) than on rank 0 "
                    f"({first.get(split)}); give every node the same data"
                )


def refuse_changed_data(
    config: Config, before: Mapping[str, str], now: Mapping[str, str]
) -> dict[str, tuple[str | None, str | None]]:
    """Compare a checkpoint's fingerprints with the run's; checkpoints of version 1 have none.

    Returns:
        Changes that `checkpoint.allow_changes` admits: old and new fingerprint by name.

    Raises:
        DataError: the pairs are others, and `checkpoint.allow_changes` does not name them.
    """
    admitted = {}
    for split in SPLITS:
        if not before or before.get(split) == now.get(split):
            continue
        if is_admitted(f"data.{split}.path", config.checkpoint.allow_changes):
            admitted[f"pairs of data.{split}.path"] = (before.get(split), now.get(split))
            continue
        raise DataError(
            f"{_path(config, split)} holds other pairs ({now.get(split)}) than the run was trained on "
            f"({before.get(split)}); restore the data, choose another run_dir, or go on with the new data on purpose "
            f"with checkpoint.allow_changes=[data.{split}.path]"
        )
    return admitted
