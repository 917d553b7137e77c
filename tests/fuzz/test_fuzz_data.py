"""Mutated preference rows and odd files: used, or refused in one printable line; never a traceback."""

from __future__ import annotations

import random
import resource
import time
from pathlib import Path

import pytest

from tests.fuzz.mutated_rows import (
    byte_tokenizer,
    error_job,
    huge_files,
    judge_file,
    load,
    mutated_row,
    refusal,
    special_files,
    wrong_with,
)

ROWS, ROWS_A_FILE = 10_000, 100


@pytest.mark.timeout(3600)
def test_mutated_rows(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    job, source = error_job(tokenizer)
    rng = random.Random(20261124)
    rows = [mutated_row(rng, number) for number in range(ROWS)]
    refusals = [refusal(row, job, source) for row in rows]
    findings = [
        f"{row!r:.200}: {wrong_with(said)}"
        for row, said in zip(rows, refusals, strict=True)
        if said and wrong_with(said)
    ]
    assert not findings, f"{len(findings)} of {ROWS}\n" + "\n".join(findings[:20])
    assert sum(said is None for said in refusals) > ROWS // 10
    for start in range(0, ROWS, ROWS_A_FILE):
        part = rows[start : start + ROWS_A_FILE]
        path = tmp_path / f"{start}.jsonl"
        path.write_bytes(b"\n".join(part))
        data = load(str(path), tmp_path / "cache", tokenizer, "skip")
        (counts,) = data.summary.sources
        assert counts.rows == sum(bool(row.strip()) for row in part)
        assert counts.rows == counts.pairs + sum(data.summary.dropped.values())
        taken = [said is None for said, row in zip(refusals[start:], part, strict=False) if row.strip()]
        assert data._epoch.shares[0].store.rows.tolist() == [place for place, good in enumerate(taken) if good]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", ["error", "skip"])
def test_special_files(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = byte_tokenizer()
    findings = []
    for name, path in special_files(tmp_path):
        problem = judge_file(path, tmp_path / "cache", tokenizer, mode)
        if problem is not None:
            findings.append(f"{name}: {problem}")
    assert not findings, "\n".join(findings)


@pytest.mark.timeout(3600)
def test_huge_files(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    findings = []
    for name, path in huge_files(tmp_path):
        started = time.process_time()
        problem = judge_file(path, tmp_path / "cache", tokenizer, "error")
        seconds = time.process_time() - started
        if problem is not None or seconds > 40:
            findings.append(f"{name}: {problem}, {seconds:.0f} s")
    assert not findings, "\n".join(findings)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 3 * 2**20, "3 GiB"
