"""Every setting and file of a tokenizer with other values: the ids that transformers gives, or one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.tokenizer_files import Judge, changes


@pytest.mark.timeout(1800)
def test_every_setting(tmp_path: Path) -> None:
    judge = Judge(tmp_path)
    found = [f"{change}: {problem}" for change in changes() if (problem := judge(change)) is not None]
    assert not found, "\n".join(found)
