"""Whether all ranks, and a run and its checkpoint, mean the same preference pairs."""

from __future__ import annotations

from collections.abc import Mapping

from nemo_lmpo.checkpoint.agreement import from_all_ranks
from nemo_lmpo.checkpoint.same_settings import is_admitted
from nemo_lmpo.config.schema import Config
from nemo_lmpo.errors import DataError

SPLITS = ("train", "validation")


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
