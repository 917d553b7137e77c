"""Every 24th of the damaged models that `make fuzz` tries."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.mutated_models import Case, cases, judge, whole_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return whole_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("case", cases()[::24], ids=lambda case: case.name)
def test_damaged_model(case: Case, models: dict[str, Path], tmp_path: Path) -> None:
    assert judge(case, models, tmp_path) is None
