"""`python -m nemo_lmpo.slurm`: what it validates, prints, submits and shows."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_lmpo.errors import ConfigError
from nemo_lmpo.slurm.__main__ import main
from nemo_lmpo.slurm.cluster import copy_templates, read_settings, settings_file, templates_dir
from nemo_lmpo.slurm.submit import Submission

SLURM = Path(__file__).resolve().parent.parent.parent / "slurm"


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and none of the variables of a cluster that the tests may run on."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("NEMO_LMPO_", "SBATCH_", "SLURM_")):
            monkeypatch.delenv(name)


def put_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    """A stand-in for a Slurm command."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def sbatch_line(said: str) -> list[str]:
    (line,) = [line for line in said.splitlines() if "sbatch " in line]
    return shlex.split(line)


def test_print_shows_layout_memory_and_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "lmpo_tiny", "--nodes", "2", "optim.lr=0.1", "--print", "model.seed=3"]) == 0
    said = capsys.readouterr().out
    assert "8 (2 nodes x 4 devices)" in said
    assert "memory expected" in said
    assert sbatch_line(said) == [
        "sbatch",
        "--job-name=lmpo_tiny",
        "--nodes=2",
        "--gpus-per-node=4",
        "--ntasks-per-node=4",
        f"--export=ALL,NEMO_LMPO_SLURM_DIR={SLURM}",
        f"{SLURM}/train_multinode.sbatch",
        "lmpo_tiny",
        "optim.lr=0.1",
        "model.seed=3",
    ]


def test_from_the_repository_the_line_is_short(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(SLURM.parent)
    arguments = ["submit", "lmpo_tiny", "--gpus-per-node=8", "--time=1:00:00", "--sbatch=--qos=debug", "--print"]
    assert main([*arguments, "run_dir=runs/test_that_does_not_exist"]) == 0
    line = sbatch_line(capsys.readouterr().out)
    line = line[line.index("sbatch") :]
    assert line[1:] == [
        *("--job-name=lmpo_tiny", "--nodes=1", "--gpus-per-node=8", "--ntasks-per-node=8", "--time=1:00:00"),
        *("--qos=debug", "slurm/train.sbatch", "lmpo_tiny", "run_dir=runs/test_that_does_not_exist"),
    ]


def test_own_recipes_are_given_by_their_whole_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_run.yaml").write_text("defaults: [lmpo_tiny, _self_]\nname: my_run\n")
    assert main(["submit", "my_run", "--config-dir", "mine", "--print"]) == 0
    assert sbatch_line(capsys.readouterr().out)[-3:] == ["my_run", "--config-dir", str(tmp_path / "mine")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lmpo_tiny", "model.tensor_model_parallel_size=8"], "4 processes do not divide by model.tensor_model_"),
        (["lmpo_tiny", "--nodes=3"], "model.global_batch_size=64 does not divide by the data-parallel size 12"),
        (["lmpo_tiny", "--nodes=0"], "--nodes=0 must be at least 1"),
        (["lmpo_tiny", "--gpus-per-node=0"], "--gpus-per-node=0 must be at least 1"),
        (["lmpo_tiney"], "lmpo_tiney is not a recipe; did you mean lmpo_tiny?"),
        (["lmpo_tiny", "model.sed=1"], "unknown key model.sed; did you mean model.seed?"),
        (["lmpo_tiny", "model.tensor_model_parallel_size=2,3"], "4 processes do not divide by"),
        (["lmpo_tiny"], "sbatch is not on this machine"),
    ],
)
def test_what_is_wrong_is_refused_before_sbatch(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "not on this machine" in message:
        monkeypatch.setattr("shutil.which", lambda name: None)
    else:
        put_program(tmp_path, monkeypatch, "sbatch", "echo must not be called >&2; exit 9")
    assert main(["submit", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize("package", ["torch", "datasets", "transformers"])
def test_a_login_node_without_the_packages_is_told_so(package: str, tmp_path: Path) -> None:
    """One sentence, and a way to submit all the same."""
    code = (
        "import sys; sys.modules[sys.argv[1]] = None; from nemo_lmpo.slurm.__main__ import main\n"
        "sys.exit(main(['submit', 'lmpo_tiny', '--print', *sys.argv[2:]]))"
    )
    command = [sys.executable, "-c", code, package]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: validation needs {package}, which {sys.executable} does not have;")
    done = subprocess.run([*command, "--no-validate"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--job-name=lmpo_tiny" in done.stdout


def test_another_runs_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "lmpo_tiny", steps=1, total=10)
    (tmp_path / "runs" / "lmpo_tiny" / "config.yaml").write_text("loss: {name: simpo}\n")
    assert main(["submit", "lmpo_tiny", "--print"]) == 1
    assert "run_dir=runs/lmpo_tiny holds another run" in capsys.readouterr().err


def test_sbatch_gets_the_settings_and_its_answer_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_program(tmp_path, monkeypatch, "sbatch", 'echo "$SBATCH_PARTITION $*" >called; echo "123;cluster"')
    (tmp_path / "settings").write_text("export SBATCH_PARTITION='a b'\nexport NEMO_LMPO_GPU_TYPE=a100\nOTHER=1\n")
    # As `datasets` does when a parallel map has ended.
    monkeypatch.setattr(os, "environ", copy.deepcopy(os.environ))
    monkeypatch.setenv("NEMO_LMPO_CLUSTER_ENV", str(tmp_path / "settings"))
    assert main(["submit", "lmpo_tiny"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^\. \S*/settings && sbatch ", said, re.MULTILINE), said
    assert "submitted job 123; its log: lmpo_tiny-123.log;" in said
    called = (tmp_path / "called").read_text()
    assert called.startswith("a b --parsable --job-name=lmpo_tiny --nodes=1 --gpus-per-node=a100:4 ")


def test_sbatchs_refusal_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_program(tmp_path, monkeypatch, "sbatch", "echo 'sbatch: error: invalid partition: x' >&2; exit 1")
    assert main(["submit", "lmpo_tiny"]) == 1
    assert "error: sbatch refused the job (sbatch: error: invalid partition: x)" in capsys.readouterr().err


def test_several_values_make_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["submit", "lmpo_tiny", "loss.lam=0.05,0.2", "model.seed=1,2,3", "optim.betas=[0.9,0.99]", "--print"]
    assert main(arguments) == 0
    line = sbatch_line(capsys.readouterr().out)
    assert "--array=0-5" in line
    assert line[-5:] == [f"{SLURM}/sweep.sbatch", "lmpo_tiny", "loss.lam=0.05,0.2", "model.seed=1,2,3", arguments[4]]


def test_combinations_vary_the_first_setting_fastest() -> None:
    request = Submission("r", ("a.b=1,2", "c=x", "d=3,4"))
    assert request.combinations() == [
        ["a.b=1", "d=3", "c=x"],
        ["a.b=2", "d=3", "c=x"],
        ["a.b=1", "d=4", "c=x"],
        ["a.b=2", "d=4", "c=x"],
    ]
    assert Submission("r", ("c=[1,2]",)).combinations() == [["c=[1,2]"]]


def test_settings_that_cannot_be_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.env"
    broken.write_text("export A=(\n")
    with pytest.raises(ValueError, match=r"broken.env cannot be read \(.*\); it is a bash file"):
        read_settings(broken)
    with pytest.raises(ValueError, match="NEMO_LMPO_CLUSTER_ENV=/nowhere does not exist; copy"):
        settings_file(tmp_path, {"NEMO_LMPO_CLUSTER_ENV": "/nowhere"})
    assert settings_file(tmp_path, {}) is None
    with pytest.raises(ValueError, match="the templates are not in /nowhere"):
        templates_dir({"NEMO_LMPO_SLURM_DIR": "/nowhere"})


def test_the_example_changes_nothing() -> None:
    assert read_settings(SLURM / "cluster.env.example") == {}


# ---- status


def write_run(path: Path, *, steps: int, total: int, outcome: str | None = None, job: str | None = "7") -> None:
    path.mkdir(parents=True)
    lines = [{"step": k + 1, "time": 1000.0 + k, "loss": 2.0 - k / 10, "step_seconds": 30.0} for k in range(steps)]
    if steps:
        lines.append({"step": steps, "time": 1000.0 + steps, "val/loss": 1.25})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "run.json").write_text(json.dumps({"total_steps": total}))
    if job is not None:
        folder = path / "job"
        folder.mkdir()
        (path / "job.json").write_text(json.dumps({"job_id": job, "restarts": 2, "directory": str(folder)}))
        if outcome is not None:
            (folder / "outcome").write_text(outcome + "\n")


def cells(said: str) -> list[list[str]]:
    return [line.split("  ") for line in said.splitlines()]


@pytest.mark.parametrize(
    ("queue", "steps", "outcome", "state"),
    [
        ("RUNNING|None|3:00:00", 4, None, "running"),
        ("PENDING|BeginTime|1-00:00:00", 4, "stopped SIGUSR1", "waiting (BeginTime)"),
        ("COMPLETING|None|0:00", 4, None, "ending"),
        ("COMPLETED|None|0:00", 10, "done", "done"),
        ("", 10, "done", "done"),
        ("", 4, "stopped SIGTERM", "stopped SIGTERM"),
        ("", 4, "refused", "failed"),
        ("", 4, None, "ended, "),
    ],
)
def test_states(
    queue: str,
    steps: int,
    outcome: str | None,
    state: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put_program(tmp_path, monkeypatch, "squeue", f"echo '{queue}'")
    write_run(tmp_path / "runs" / "a", steps=steps, total=10, outcome=outcome)
    assert main(["status"]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.startswith("run     state")
    assert line.startswith(f"runs/a  {state}")
    assert f"{steps}/10" in line.split()
    if queue.startswith("RUNNING"):
        # six steps of 30 seconds are left
        assert line.split() == ["runs/a", "running", "4/10", "1.7000", "1.2500", "0:03:00", "7", "2", "3:00:00"]


def test_without_slurm_and_without_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    write_run(tmp_path / "runs" / "fresh", steps=0, total=10)
    write_run(tmp_path / "runs" / "x_sweep" / "loss.lam-1", steps=2, total=10, job=None)
    (tmp_path / "runs" / "slurm").mkdir()
    assert main(["status"]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 3
    assert "runs/fresh               unknown " in said
    assert "runs/x_sweep/loss.lam-1  unknown, " in said


def test_a_run_that_stopped_early_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    write_run(tmp_path / "runs" / "early", steps=4, total=10, job=None)
    why = {"step": 4, "monitor": "val/loss", "best": 1.0, "without_better": 2}
    (tmp_path / "runs" / "early" / "run.json").write_text(json.dumps({"total_steps": 10, "stopped_early": why}))
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split() == ["runs/early", "done", "4/10", "1.7000", "1.2500", "0:00:00", "-", "-", "-"]


def test_status_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 1
    assert "there are no runs in ./runs" in capsys.readouterr().err
    assert main(["status", "nowhere"]) == 1
    assert "nowhere is not the directory of a run that has started" in capsys.readouterr().err


def test_templates_for_those_without_a_checkout(tmp_path: Path) -> None:
    folder = copy_templates(tmp_path / "mine" / "slurm")
    assert {path.name for path in folder.iterdir()} == {path.name for path in SLURM.iterdir()} - {"cluster.env"}
    assert os.access(folder / "train.sbatch", os.R_OK)
    assert templates_dir({"NEMO_LMPO_SLURM_DIR": str(folder)}) == folder
    (folder / "cluster.env").write_text("export SBATCH_PARTITION=mine\n")
    (folder / "train.sbatch").write_text("mine")
    with pytest.raises(ConfigError, match=r"other files of the name train\.sbatch; --overwrite"):
        copy_templates(folder)
    assert (folder / "train.sbatch").read_text() == "mine"
    copy_templates(folder, overwrite=True)
    assert (folder / "train.sbatch").read_text() != "mine"
    assert (folder / "cluster.env").read_text() == "export SBATCH_PARTITION=mine\n"
    with pytest.raises(ConfigError, match="is a file"):
        copy_templates(folder / "train.sbatch")
