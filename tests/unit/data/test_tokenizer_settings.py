"""Every 30th of the changed tokenizer directories that `make fuzz` tries."""

from __future__ import annotations

from itertools import islice

import pytest

from tests.fuzz.tokenizer_files import Change, Judge, changes


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return Judge(tmp_path_factory.mktemp("tokenizers"))


@pytest.mark.parametrize("change", islice(changes(), 0, None, 30), ids=str)
def test_change(change: Change, judge: Judge) -> None:
    assert judge(change) is None
