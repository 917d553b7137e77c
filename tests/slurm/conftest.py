"""A local Slurm, and the jobs that run on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.local_slurm import LocalSlurm, why_unavailable
from tests.slurm.stories import Stories


@pytest.fixture(scope="session")
def slurm() -> Iterator[LocalSlurm]:
    reason = why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    with LocalSlurm(nodes=5) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def stories(slurm: LocalSlurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stories]:
    told = Stories(slurm, tmp_path_factory.mktemp("slurm"))
    yield told
    told.close()
