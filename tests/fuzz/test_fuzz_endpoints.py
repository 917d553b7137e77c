"""Every kind of request to a server against every fault: sentences, no tracebacks, no lost answers (minutes)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.endpoint_walk import KINDS, cases, walk
from tests.system.faulty_server import faulty


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_may_do_anything(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty() as server:
        for number, (name, fault) in enumerate(cases(kind)):
            walk(kind, name, fault, server, tmp_path / str(number), monkeypatch)
