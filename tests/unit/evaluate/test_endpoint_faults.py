"""A slice of the walk in tests/fuzz: what servers do wrong ends in a sentence, and costs no other answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.endpoint_walk import KINDS, cases, walk
from tests.system.faulty_server import FaultyServer, faulty

EVERY = {"models": 6, "completions": 6, "chat": 8, "preferences": 14, "echo": 12}


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with faulty() as running:
        yield running


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_of_all_faults(
    kind: str, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (name, fault) in enumerate(cases(kind)):
        if number % EVERY[kind] == 3:
            walk(kind, name, fault, server, tmp_path / str(number), monkeypatch)
