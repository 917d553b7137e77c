"""The launchers' own programs read our files: each is installed into an environment of its own (minutes, 1 GB)."""

from __future__ import annotations

import subprocess
import venv
from pathlib import Path

import pytest

LAUNCHERS = Path(__file__).resolve().parents[2] / "launchers"

DSTACK = """
import sys, yaml
from dstack._internal.core.models.configurations import parse_run_configuration
task = parse_run_configuration(yaml.safe_load(open(sys.argv[1])))
assert task.resources.gpu.count.min == 4 and task.type == "task"
"""
SKYPILOT = """
import sys, sky
task = sky.Task.from_yaml(sys.argv[1])
[resources] = task.resources
assert resources.accelerators == {"A100-80GB": 4}
"""
JOBSET = """
import sys, yaml, kubernetes_validate
jobset = yaml.safe_load(open(sys.argv[1]))
[node] = jobset["spec"]["replicatedJobs"]
job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}, **node["template"]}
kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
"""
NEMO_RUN = """
import runpy, sys
sys.argv = [sys.argv[1], "lmpo_tiny", "trainer.max_steps=2", *"--nodes 2 --account a --partition p --dry-run".split()]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("packages", "program", "file", "said"),
    [
        (("dstack",), DSTACK, "dstack.yml", ""),
        (("skypilot",), SKYPILOT, "skypilot.yaml", ""),
        (("kubernetes-validate", "pyyaml"), JOBSET, "jobset.yaml", ""),
        # Of leptonai, which it imports, newer versions have other modules.
        (("nemo_run", "leptonai==0.26.6"), NEMO_RUN, "nemo_run_train.py", "-m nemo_lmpo.train"),
    ],
    ids=["dstack", "skypilot", "jobset", "nemo_run"],
)
def test_the_tool_reads_the_file(packages: tuple[str, ...], program: str, file: str, said: str, tmp_path: Path) -> None:
    venv.create(tmp_path / "python", with_pip=True)
    python = tmp_path / "python" / "bin" / "python"
    installed = subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], capture_output=True, check=False)
    if installed.returncode:
        pytest.skip(f"{packages[0]} does not install here")
    done = subprocess.run(
        [python, "-c", program, LAUNCHERS / file], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in " ".join((done.stdout + done.stderr).split())
