"""The templates where no job runs: they refuse in one sentence, and remove, cancel and start nothing."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SLURM = ROOT / "slurm"
TEMPLATES = sorted(path.name for path in SLURM.glob("*.sbatch"))
SCRIPTS = [
    *sorted(SLURM.glob("*.s*")),
    *sorted((ROOT / "tests").rglob("*.sh")),
    *sorted((ROOT / "benchmarks").rglob("*.sh")),
    *(path for path in (ROOT / ".ci" / "run",) if path.is_file()),
]

_NOT_RUNNING = "echo JobId=17 JobName=x UserId=me JobState=COMPLETED Reason=None Restarts=0"
_UNKNOWN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


def make_workplace(folder: Path, scontrol: str | None) -> dict[str, str]:
    """A folder with the files of jobs, and Slurm's commands; the environment for a template."""
    for name in ("runs/slurm/17/rank-0.log", "runs/slurm/17_2/attempts", "runs/slurm/keep", "runs/a/config.yaml", "me"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (folder / "slurm").symlink_to(SLURM)
    programs = {name: f'echo "{name} $*" >>"{folder}/called"' for name in ("srun", "scancel", "sbatch", "python")}
    if scontrol is not None:
        programs["scontrol"] = scontrol
    (folder / "bin").mkdir()
    for name, script in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    return {"PATH": f"{folder}/bin:/usr/bin:/bin", "HOME": str(folder)}


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("program", [*TEMPLATES, "task.sh"])
@pytest.mark.parametrize(
    "variables",
    [{}, {"NEMO_LMPO_SLURM_DIR": str(SLURM)}, {"SLURM_JOB_ID": "", "SLURM_ARRAY_JOB_ID": "17"}],
    ids=["plain", "told where", "empty number"],
)
def test_nothing_happens_outside_of_a_job(program: str, variables: dict[str, str], tmp_path: Path) -> None:
    refused(program, variables, None, tmp_path)


@pytest.mark.parametrize("program", TEMPLATES)
@pytest.mark.parametrize(
    ("variables", "scontrol"),
    [
        ({"SLURM_JOB_ID": "."}, None),
        ({"SLURM_JOB_ID": "17/.."}, None),
        ({"SLURM_JOB_ID": "17"}, _UNKNOWN),
        ({"SLURM_JOB_ID": "17"}, _NOT_RUNNING),
        ({"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"}, _NOT_RUNNING),
    ],
    ids=["no number", "a path", "unknown", "ended", "ended array"],
)
def test_nothing_happens_with_variables_of_a_job_that_ended(
    program: str, variables: dict[str, str], scontrol: str | None, tmp_path: Path
) -> None:
    refused(program, {"SLURM_SUBMIT_DIR": str(tmp_path), **variables}, scontrol, tmp_path)


def refused(program: str, variables: dict[str, str], scontrol: str | None, tmp_path: Path) -> None:
    environment = make_workplace(tmp_path, scontrol)
    before = contents(tmp_path)
    done = subprocess.run(
        ["bash", f"slurm/{program}", "lmpo_tiny", "loss.lam=0.1,0.2", "--model=m", "--output=p"],
        cwd=tmp_path,
        env={"SLURM_ARRAY_TASK_ID": "0", **environment, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    said = (done.stdout + done.stderr).splitlines()
    assert [line for line in said if "error: " in line] == said[-1:], said
    assert re.search("^slurm: error: .*(inside of a Slurm job|is not running).*submit .*sbatch", said[-1]), said
    assert contents(tmp_path) == before


def commands(text: str) -> Iterator[str]:
    """Commands that remove files, act on jobs, or end processes, with their arguments."""
    for line in text.replace("\\\n", " ").splitlines():
        if not line.lstrip().startswith("#"):
            yield from re.findall(r"(?:^|[\s;&|(!'\"`@-])((?:rm|scancel|scontrol|squeue|kill|rmdir)\s[^;|&#]*)", line)


def is_guarded(command: str) -> bool:
    """Whether every variable of it ends the script when unset; jobs go by job_name, which no array's number is."""
    variables = re.findall(r"\$\{?!?([A-Za-z_@*0-9]\w*)(:\?)?", command)
    if command.split()[0] in ("scancel", "scontrol", "squeue") and "SLURM_JOB_ID" in command:
        return False
    return all(guard or name in "@*0123456789" for name, guard in variables)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_removes_and_cancels_names_it_with_a_guard(script: Path) -> None:
    assert [command for command in commands(script.read_text()) if not is_guarded(command)] == []


def test_the_walk_finds_commands_without_a_guard() -> None:
    bad = [
        'rm -rf "$jobs_dir/$SLURM_JOB_ID"',
        '[ x ] || rm -rf "$job_dir"',
        'scancel --signal=USR1 "$SLURM_JOB_ID"',
        'scontrol requeue "${SLURM_JOB_ID:?}"',
        "x=$(scontrol show job $id)",
        "trap 'rm -f $log' EXIT",
        'rm -rf \\\n    "${a:?}" "$b"',
        "kill ${pid:-}",
    ]
    for line in bad:
        assert [command for command in commands(line) if not is_guarded(command)], line
    good = ['rm -rf -- "${job_dir:?}"', 'scancel "${job_name:?}"', "rm -f /usr/sbin/policy-rc.d", '# rm "$x"']
    for line in good:
        assert all(is_guarded(command) for command in commands(line)), line
