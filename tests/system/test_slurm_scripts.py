"""The templates' shell part with stand-ins for Slurm's commands: settings, containers, ports, sweeps."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

SLURM = Path(__file__).resolve().parent.parent.parent / "slurm"
LIMIT = "2030-01-02T03:04:05"
STAND_INS = {
    "srun": 'printf "%s\\n" "$@" >"$TEST_FOLDER/srun"; env >"$TEST_FOLDER/env"\n'
    'echo "${TEST_OUTCOME:-done}" >"$NEMO_LMPO_JOB_DIR/outcome"; exit "${TEST_STATUS:-0}"',
    "scontrol": f"""case "$*" in
    *hostnames*) printf "node1\\nnode2\\n" ;;
    *requeue*)
        echo "$*" >>"$TEST_FOLDER/requeue"
        [ -z "${{TEST_NO_REQUEUE:-}}" ] || {{ echo "Requested operation is presently disabled" >&2; exit 1; }} ;;
    *)
        if [ -e "$TEST_FOLDER/srun" ] && [ -n "${{TEST_SILENT:-}}" ]; then exit 1; fi
        name=${{*: -1}}
        if [ "$name" != "${{TEST_JOB:-$name}}" ]; then echo "Invalid job id specified" >&2; exit 1; fi
        echo "JobId=$SLURM_JOB_ID JobName=a JobState=FAILED Restarts=9 UserId=me JobState=RUNNING Restarts=0" \\
            "EndTime={LIMIT}" ;;
    esac""",
    "scancel": "exit 0",
    "sleep": "exit 0",
}


class Job:
    """Runs a function of common.sh as a batch script would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name, script in STAND_INS.items():
            program = folder / "bin" / name
            program.write_text(f"#!/bin/bash\n{script}\n")
            program.chmod(0o755)

    def run(self, *command: str, status: int = 0, **variables: str) -> str:
        foreign = ("SLURM_", "SBATCH_", "NEMO_", "OMP_")
        clean = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        environment = {
            **clean,
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "TEST_FOLDER": str(self.folder),
            "SLURM_JOB_ID": "7",
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_NTASKS": "8",
            "SLURM_CPUS_PER_TASK": "6",
            "NEMO_LMPO_CLUSTER_ENV": str(self.settings("")),
            **variables,
        }
        script = f'. "{SLURM}/common.sh"; . "{SLURM}/serve.sh"; "$@"'
        done = subprocess.run(
            ["bash", "-c", script, "job", *command],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        said = done.stdout + done.stderr
        assert done.returncode == status, said
        return said

    def settings(self, text: str) -> Path:
        path = self.folder / "cluster.env"
        if text or not path.exists():
            path.write_text(text)
        return path

    @property
    def srun(self) -> list[str]:
        return (self.folder / "srun").read_text().splitlines()

    @property
    def environment(self) -> dict[str, str]:
        lines = (self.folder / "env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_one_process_a_gpu_with_a_rendezvous(job: Job) -> None:
    said = job.run("run_training", "lmpo_tiny", "a.b=c d")
    assert f"=== job 7, restart 0, 8 processes on node[1-2], ends {LIMIT.replace('T', ' ')}" in said
    assert said.splitlines()[-1] == "slurm: all steps are done"
    assert job.srun[:4] == ["--kill-on-bad-exit=1", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4"]
    assert job.srun[4:] == [
        *("bash", f"{SLURM}/task.sh", "rank", "python", "-m", "nemo_lmpo.train"),
        *("--config-name", "lmpo_tiny", "a.b=c d"),
    ]
    found = job.environment
    assert (found["MASTER_ADDR"], found["SRUN_CPUS_PER_TASK"], found["OMP_NUM_THREADS"]) == ("node1", "6", "6")
    assert 10007 <= int(found["MASTER_PORT"]) < 10015
    end = subprocess.run(["date", "-d", LIMIT, "+%s"], capture_output=True, text=True, check=True).stdout.strip()
    assert found["NEMO_LMPO_JOB_END"] == end
    assert "NCCL_SOCKET_IFNAME" not in found


def test_a_port_in_use_is_passed_over(job: Job) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        # the number that gives this port
        job.run("run_training", "r", SLURM_JOB_ID=str((port - 10000) % 20000 + (20000 if port >= 30000 else 0)))
        chosen = int(job.environment["MASTER_PORT"])
    if port < 30000:
        assert chosen == port + 1
    else:
        assert 10000 <= chosen < 30008


def test_torchrun_starts_a_task_a_node(job: Job) -> None:
    job.run("run_training", "r", NEMO_LMPO_LAUNCHER="torchrun")
    assert job.srun[1:4] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    assert job.srun[4:7] == ["bash", f"{SLURM}/task.sh", "node"]
    found = job.environment
    assert (found["NEMO_LMPO_RANKS_PER_NODE"], found["NEMO_LMPO_NODES"], found["SRUN_CPUS_PER_TASK"]) == (
        "4",
        "2",
        "24",
    )


def test_settings_choose_interpreter_setup_and_interface(job: Job) -> None:
    python = job.folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/bin/true")
    job.settings(
        f"export NEMO_LMPO_VENV={job.folder}/venv NEMO_LMPO_INTERFACE=ib0\nexport NEMO_LMPO_SETUP='export LOADED=1'\n"
    )
    job.run("run_training", "r")
    assert str(python) in job.srun
    found = job.environment
    assert (found["NCCL_SOCKET_IFNAME"], found["GLOO_SOCKET_IFNAME"], found["LOADED"]) == ("ib0", "ib0", "1")


def test_apptainer_runs_the_task_inside(job: Job) -> None:
    job.run(
        *("run_training", "r"),
        NEMO_LMPO_CONTAINER="apptainer",
        NEMO_LMPO_IMAGE="/images/a.sif",
        NEMO_LMPO_MOUNTS="/data,/models:/m",
    )
    assert job.srun[4:12] == [
        *("apptainer", "exec", "--nv", "--pwd", str(job.folder), "--bind"),
        f"{job.folder},{SLURM},{job.folder}/runs/slurm,/data,/models:/m",
        "/images/a.sif",
    ]
    assert job.srun[12:14] == ["bash", f"{SLURM}/task.sh"]


def test_pyxis_gets_srun_options(job: Job) -> None:
    job.run(
        *("run_training", "r"),
        NEMO_LMPO_CONTAINER="pyxis",
        NEMO_LMPO_IMAGE="nvcr.io#a/b",
        NEMO_LMPO_MOUNTS="/data,/x:/m",
    )
    jobs = f"{job.folder}/runs/slurm"
    assert job.srun[4:7] == [
        "--container-image=nvcr.io#a/b",
        f"--container-workdir={job.folder}",
        f"--container-mounts={job.folder}:{job.folder},{SLURM}:{SLURM},{jobs}:{jobs},/data:/data,/x:/m",
    ]
    assert job.srun[7] == "bash"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NEMO_LMPO_LAUNCHER": "mpirun"}, "NEMO_LMPO_LAUNCHER=mpirun is unknown; choose srun or torchrun"),
        ({"NEMO_LMPO_CONTAINER": "docker"}, "NEMO_LMPO_CONTAINER=docker is unknown; choose none, pyxis or apptainer"),
        ({"NEMO_LMPO_CONTAINER": "pyxis"}, "needs NEMO_LMPO_IMAGE"),
        ({"NEMO_LMPO_VENV": "/nowhere"}, "NEMO_LMPO_VENV=/nowhere has no bin/python"),
        ({"NEMO_LMPO_CLUSTER_ENV": "/nowhere"}, "NEMO_LMPO_CLUSTER_ENV=/nowhere does not exist"),
        ({"NEMO_LMPO_SETUP": "false"}, "NEMO_LMPO_SETUP failed"),
        ({"SLURM_NTASKS": "7"}, "7 tasks do not divide by 2 nodes"),
    ],
)
def test_wrong_settings_are_one_message(job: Job, variables: dict[str, str], message: str) -> None:
    said = job.run("run_training", "r", status=1, **variables)
    assert "slurm: error: " in said
    assert message in said
    assert not (job.folder / "srun").exists()


def test_a_refused_requeue_is_told_in_slurms_words(job: Job) -> None:
    said = job.run("run_training", "r", status=1, TEST_OUTCOME="stopped SIGUSR1", TEST_NO_REQUEUE="1")
    assert "slurm: stopped SIGUSR1; requeueing" in said
    assert "Slurm does not requeue the job (Requested operation is presently disabled)" in said
    assert said.splitlines()[-1].endswith("; submit the same line again to resume")


def test_a_controller_that_does_not_answer_at_the_end_is_no_cancellation(job: Job) -> None:
    """And no bash error either: there is no number of restarts to compare then."""
    said = job.run("run_training", "r", TEST_OUTCOME="stopped SIGUSR1", TEST_SILENT="1")
    assert "slurm: stopped SIGUSR1; requeueing" in said
    assert "integer expression" not in said
    assert (job.folder / "requeue").read_text() == "requeue 7\n"


def test_variables_of_another_job_are_not_believed(job: Job) -> None:
    """A job submitted from inside a task of an array inherits that task's variables, restarts and end."""
    stale: dict[str, Any] = {"SLURM_ARRAY_JOB_ID": "3", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"}
    said = job.run(
        "run_training", "r", TEST_OUTCOME="stopped SIGUSR1", TEST_JOB="7", SLURM_RESTART_COUNT="3",
        SLURM_JOB_END_TIME="1", **stale,
    )  # fmt: skip
    assert f"=== job 7, restart 0, 8 processes on node[1-2], ends {LIMIT.replace('T', ' ')}" in said
    assert (job.folder / "requeue").read_text() == "requeue 7\n"
    assert not any(name.startswith("SLURM_ARRAY_") for name in job.environment)
    assert job.environment["SLURM_RESTART_COUNT"] == "0"


def test_a_refused_run_is_not_requeued(job: Job) -> None:
    said = job.run("run_training", "r", status=1, TEST_OUTCOME="refused", TEST_STATUS="1")
    assert "it would fail again, so the job is not requeued" in said
    assert not (job.folder / "requeue").exists()


@pytest.mark.parametrize(
    ("task", "chosen"),
    [
        ("0", ["loss.lam=0.1", "model.seed=1"]),
        ("1", ["loss.lam=0.2", "model.seed=1"]),
        ("2", ["loss.lam=0.1", "model.seed=2"]),
        ("5", ["loss.lam=0.2", "model.seed=3"]),
    ],
)
def test_a_sweeps_task_has_its_combination(job: Job, task: str, chosen: list[str]) -> None:
    arguments = ["loss.lam=0.1,0.2", "optim.betas=[0.9,0.99]", "model.seed=1,2,3"]
    job.run("run_sweep", "r", *arguments, SLURM_ARRAY_TASK_ID=task)
    name = "_".join(chosen).replace("=", "-")
    assert job.srun[-4:] == [f"run_dir=runs/r_sweep/{name}", *chosen, "optim.betas=[0.9,0.99]"]


def test_sweeps_have_values_of_their_own(job: Job) -> None:
    job.run("run_sweep", "r", SLURM_ARRAY_TASK_ID="8")
    assert job.srun[-2:] == ["loss.lam=1.0", "model.seed=3"]
    assert "there are only 9 combinations" in job.run("run_sweep", "r", SLURM_ARRAY_TASK_ID="9")
    assert "submit it with --array" in job.run("run_sweep", "r", status=1)
