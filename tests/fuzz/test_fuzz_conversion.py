"""Damaged archives and models: one sentence each, never a traceback, a hang, or an output that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.mutated_models import cases, judge, whole_models


@pytest.mark.timeout(3600)
def test_every_damaged_model_is_refused_or_converted_rightly(tmp_path: Path) -> None:
    models = whole_models(tmp_path)
    findings = []
    for number, case in enumerate(cases()):
        directory = tmp_path / str(number)
        directory.mkdir()
        problem = judge(case, models, directory)
        if problem is not None:
            findings.append(f"{case.name}: {problem}")
    assert not findings, f"{len(findings)} of {len(cases())}\n" + "\n".join(findings)
