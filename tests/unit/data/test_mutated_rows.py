"""A slice of the fuzz target (`make fuzz`) for data."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.mutated_rows import (
    byte_tokenizer,
    error_job,
    judge_file,
    mutated_row,
    refusal,
    special_files,
    wrong_with,
)


def test_mutated_rows_are_used_or_refused_in_one_printable_line() -> None:
    job, source = error_job(byte_tokenizer())
    rng = random.Random(7)
    rows = [mutated_row(rng, number) for number in range(600)]
    refusals = [refusal(row, job, source) for row in rows]
    assert [wrong_with(said) for said in refusals if said and wrong_with(said)] == []
    assert 60 < sum(said is None for said in refusals) < 500


def test_odd_files_are_used_or_refused_in_one_printable_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = byte_tokenizer()
    wanted = {
        "list_first.jsonl", "digits.jsonl", "escape.jsonl", "deep.jsonl", "fifo.jsonl", "loop.jsonl", "text.parquet",
        "types.parquet", "path 0", "path 7", "wide.csv", "nul.csv", "flipped.jsonl.gz", "nested.json", "saved_state",
    }  # fmt: skip
    files = [(name, path) for name, path in special_files(tmp_path) if name in wanted]
    assert len(files) == len(wanted)
    findings = {name: judge_file(path, tmp_path / "cache", tokenizer, "skip") for name, path in files}
    assert {name: problem for name, problem in findings.items() if problem} == {}
