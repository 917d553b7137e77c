"""One process with Transformer Engine for all tests here, which are skipped where its Python is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.te_emulation.host import MISSING, Host, find_python

_HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_python() is not None:
        return
    for item in items:
        if _HERE in item.path.resolve().parents:
            item.add_marker(pytest.mark.skip(reason=MISSING))


@pytest.fixture(scope="session")
def host() -> Iterator[Host]:
    folder = find_python()
    assert folder is not None
    started = Host(folder)
    yield started
    started.stop()
