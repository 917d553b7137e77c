"""A process group of one, as a single-process run has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nemo_lmpo.config.schema import ModelConfig
from nemo_lmpo.parallel.groups import ParallelGroups, create_groups, destroy_groups, start_process_group
from nemo_lmpo.runtime.cpu_adapter import on_cpu
from nemo_lmpo.runtime.launch import LaunchInfo


@pytest.fixture(scope="module")
def one_process() -> Iterator[ParallelGroups]:
    """Groups of one rank each, through the CPU adapter."""
    with on_cpu():
        start_process_group(LaunchInfo(), use_cuda=False)
        try:
            yield create_groups(ModelConfig())
        finally:
            destroy_groups()
