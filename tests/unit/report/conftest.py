from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.report import write_report
from tests.unit.report.runs import write_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Any]:
    return functools.partial(write_run, tmp_path)


@pytest.fixture(scope="session")
def example_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of such a run, made once."""
    return write_report(write_run(tmp_path_factory.mktemp("example")))
