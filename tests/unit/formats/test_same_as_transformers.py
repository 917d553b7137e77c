"""Hugging Face directories are read as transformers reads them: a part of what `make fuzz` tries."""

from __future__ import annotations

from itertools import islice

import pytest

from tests.fuzz.against_transformers import Change, Judge, combined_changes, field_changes, weight_changes

CHANGES = (
    *(change for change in weight_changes() if change.must_load),
    *islice(field_changes(), 0, None, 120),
    *islice(combined_changes(), 0, 800, 40),
)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return Judge(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_change(change: Change, judge: Judge) -> None:
    assert judge(change) is None
