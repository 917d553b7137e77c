"""Machines where Transformer Engine is installed: broken, or without a GPU. Processes of their own, for imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BROKEN = "raise RuntimeError('Found empty `transformer-engine` meta package installed.\\nInstall it again.')"


def run(program: str, packages: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """What the metapackage alone is: it can be found, and importing it fails."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text(BROKEN)
    return tmp_path


def test_a_broken_one_is_told_and_hidden(broken: Path) -> None:
    program = (
        "from nemo_lmpo.runtime.transformer_engine import find_transformer_engine as find; found = find(); "
        "import megatron.core.extensions.transformer_engine as engine; "
        "print(found.usable, engine.HAVE_TE, found.problem)"
    )
    usable, have, *problem = run(program, broken).split(" ")
    assert (usable, have) == ("False", "False")
    text = " ".join(problem)
    assert "installed but broken: Found empty `transformer-engine` meta package installed." in text
    assert "pip install --no-build-isolation" in text


def test_cpu_runs_leave_it_out(broken: Path) -> None:
    program = (
        "from nemo_lmpo.runtime.transformer_engine import leave_out_transformer_engine as leave; leave(); "
        "import megatron.core.optimizer as optimizer; print(optimizer.Adam.__module__)"
    )
    assert run(program, broken) == "torch.optim.adamw"
