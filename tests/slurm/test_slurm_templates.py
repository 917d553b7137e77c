"""What Slurm and shellcheck say of the templates; no job runs."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.slurm.local_slurm import LocalSlurm
from tests.slurm.stories import ROOT, SLURM

pytestmark = pytest.mark.slurm

TEMPLATES = sorted(path.name for path in SLURM.glob("*.sbatch"))


def test_the_templates_are_there() -> None:
    assert TEMPLATES == [
        "convert.sbatch",
        "evaluate.sbatch",
        "generate.sbatch",
        "pairs.sbatch",
        "sweep.sbatch",
        "train.sbatch",
        "train_multinode.sbatch",
    ]


@pytest.mark.parametrize("template", TEMPLATES)
def test_slurm_accepts_the_template(slurm: LocalSlurm, template: str) -> None:
    said = slurm.run("sbatch", "--test-only", str(SLURM / template), "lmpo_tiny")
    assert "to start at" in said
    if template != "convert.sbatch":
        assert "to start at" in slurm.run("sbatch", "--test-only", "--gpus-per-node=a100:4", str(SLURM / template))


@pytest.mark.parametrize(
    "template", ["train.sbatch", "train_multinode.sbatch", "sweep.sbatch", "generate.sbatch", "evaluate.sbatch"]
)
@pytest.mark.parametrize("request_", ["h100:1", "5"])
def test_the_templates_ask_for_gpus_that_must_exist(slurm: LocalSlurm, template: str, request_: str) -> None:
    said = slurm.run("sbatch", "--test-only", f"--gpus-per-node={request_}", str(SLURM / template), check=False)
    assert "to start at" not in said


def test_templates_ask_for_the_gpus_of_a_node(slurm: LocalSlurm) -> None:
    for template, nodes in (("train.sbatch", "1"), ("train_multinode.sbatch", "2"), ("sweep.sbatch", "1")):
        job = slurm.run("sbatch", "--parsable", "--hold", str(SLURM / template), cwd=slurm.state).strip()
        description = slurm.job(f"{job}_0" if template == "sweep.sbatch" else job)
        slurm.run("scancel", job)
        assert description["TresPerNode"] == "gres:gpu:4"
        assert description["NumNodes"].split("-")[0] == nodes
        assert description["NtasksPerN:B:S:C"].startswith("4:")
        assert description["Requeue"] == "1"


def test_variables_of_the_settings_file_reach_sbatch(slurm: LocalSlurm) -> None:
    job = slurm.run(
        *("sbatch", "--parsable", "--hold", str(SLURM / "train.sbatch")),
        cwd=slurm.state,
        SBATCH_PARTITION="other",
        SBATCH_TIMELIMIT="33",
    ).strip()
    description = slurm.job(job)
    slurm.run("scancel", job)
    assert (description["Partition"], description["TimeLimit"]) == ("other", "00:33:00")


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed; run tests/slurm/install.sh as root")
    scripts = [*SLURM.glob("*.sbatch"), *SLURM.glob("*.sh"), ROOT / "tests" / "slurm" / "install.sh"]
    command = ["shellcheck", "-x", "-P", str(ROOT), *map(str, scripts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    example = subprocess.run(["shellcheck", "-s", "bash", str(SLURM / "cluster.env.example")], check=False)
    assert example.returncode == 0
