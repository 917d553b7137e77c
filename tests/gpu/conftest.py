"""GPU tests run one after another in one process, on one device; without one they are skipped before any set-up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REHEARSED

_HERE = Path(__file__).resolve().parent


@pytest.fixture
def memory_is_counted(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a GPU by its allocator; in a rehearsal by a look at every tensor, which other tests leave out."""
    driver = request.config.stash.get(REHEARSED, None)
    if driver is None:
        yield
        return
    from tests.rehearsal.tensors import LiveBytes

    with LiveBytes(driver):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip at collection: a fixture that only one test's function asks for would come after those of the module."""
    own = [item for item in items if _HERE in item.path.resolve().parents]
    if not own:
        return
    import torch

    for item in own:
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
