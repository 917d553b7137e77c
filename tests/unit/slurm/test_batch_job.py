"""What a process knows of its batch job, when it stops for it, and what it leaves for the batch script."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from nemo_lmpo.errors import ConfigError
from nemo_lmpo.runtime.batch_job import BatchJob, expired_end, leave_outcome, read_batch_job, stopped
from nemo_lmpo.runtime.launch import LaunchInfo, read_launch_info
from nemo_lmpo.training.stop import StopCondition


def test_there_is_no_job_outside_of_slurm() -> None:
    assert read_batch_job({}) is None
    assert read_batch_job({"NEMO_LMPO_JOB_DIR": "/tmp"}) is None


def test_a_job_is_read_from_the_templates_variables(tmp_path: Path) -> None:
    job = read_batch_job(
        {
            "SLURM_JOB_ID": "17",
            "SLURM_RESTART_COUNT": "2",
            "NEMO_LMPO_JOB_END": "4000000000",
            "SLURM_JOB_END_TIME": "1",
            "NEMO_LMPO_MARGIN_SECONDS": "90",
            "NEMO_LMPO_JOB_DIR": str(tmp_path),
        }
    )
    assert job == BatchJob("17", 2, 4000000000.0, 90.0, tmp_path)
    assert job.stop_at == 4000000000.0 - 90.0


def test_a_task_of_an_array_is_named_as_one() -> None:
    """The last task's number is the array's: a command that gets it acts on every task."""
    job = read_batch_job({"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"})
    assert job is not None
    assert job.job_id == "17_3"


@pytest.mark.parametrize("end", ["", "never", "inf", "nan"])
def test_a_job_without_limit_has_no_end(end: str) -> None:
    job = read_batch_job({"SLURM_JOB_ID": "17", "NEMO_LMPO_JOB_END": end})
    assert job is not None
    assert job.ends_at is None
    assert job.stop_at is None


def test_newer_slurms_tell_the_end_themselves() -> None:
    job = read_batch_job({"SLURM_JOB_ID": "17", "SLURM_JOB_END_TIME": "4000000000", "NEMO_LMPO_MARGIN_SECONDS": "-5"})
    assert job is not None
    assert job.stop_at == 4000000000.0


@pytest.mark.parametrize("name", ["NEMO_LMPO_JOB_END", "SLURM_JOB_END_TIME"])
def test_an_end_in_the_past_is_that_of_another_job(name: str) -> None:
    """A run would stop before its first step, having saved nothing."""
    environ = {"SLURM_JOB_ID": "17", name: "1700000000"}
    job = read_batch_job(environ)
    assert job is not None
    assert job.stop_at is None
    assert expired_end(environ) == f"{name}=1700000000"
    assert expired_end({**environ, name: "4000000000"}) is None
    assert expired_end({name: "1700000000"}) is None


def test_a_job_without_limit_does_not_take_over_another_ones() -> None:
    environ = {"SLURM_JOB_ID": "17", "NEMO_LMPO_JOB_END": "", "SLURM_JOB_END_TIME": "4000000000"}
    job = read_batch_job(environ)
    assert job is not None
    assert job.ends_at is None


def test_a_job_is_recorded_in_the_run_and_for_the_script(tmp_path: Path) -> None:
    run, directory = tmp_path / "run", tmp_path / "job"
    run.mkdir()
    directory.mkdir()
    BatchJob("17", 1, 5.0, 60.0, directory).record(run)
    assert json.loads((run / "job.json").read_text()) == {
        "job_id": "17",
        "restarts": 1,
        "ends_at": 5.0,
        "margin_seconds": 60.0,
        "directory": str(directory),
    }
    assert (directory / "run_dir").read_text() == f"{run}\n"
    assert {path.name for path in run.iterdir()} == {"job.json"}


def test_the_outcome_is_left_in_the_jobs_folder_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("NEMO_LMPO_JOB_DIR", str(tmp_path))
    leave_outcome("done")
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    leave_outcome(stopped("time limit"))
    assert (tmp_path / "outcome").read_text() == "stopped time limit\n"
    monkeypatch.setenv("NEMO_LMPO_JOB_DIR", str(tmp_path / "missing"))
    leave_outcome("done")


def test_a_refused_command_leaves_that_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_lmpo.train import main

    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("NEMO_LMPO_JOB_DIR", str(tmp_path))
    assert main(["--config-name", "lmpo_tiny", "model.nonsense=1"]) == 1
    assert (tmp_path / "outcome").read_text() == "refused\n"


@pytest.mark.parametrize(
    ("max_seconds", "stop_in", "stops"),
    [(None, None, False), (1000.0, None, False), (30.0, None, True), (None, 1000.0, False), (None, 30.0, True),
     (1000.0, 30.0, True), (30.0, 1000.0, True)],
)  # fmt: skip
def test_a_step_and_a_save_must_fit_before_either_end(
    max_seconds: float | None, stop_in: float | None, stops: bool
) -> None:
    now = time.time()
    watch = StopCondition(max_seconds, started=now, stop_at=None if stop_in is None else now + stop_in)
    watch.longest_step, watch.longest_save = 15.0, 20.0
    assert watch._own_reason(validates=False) == int(stops)


def test_a_validation_that_is_next_must_fit_as_well() -> None:
    watch = StopCondition(None, started=0.0, stop_at=time.time() + 100)
    watch.longest_step, watch.longest_save, watch.longest_validation = 10.0, 10.0, 200.0
    assert watch._own_reason(validates=False) == 0
    assert watch._own_reason(validates=True) == 1


def test_a_signal_comes_before_the_clock() -> None:
    with StopCondition(0.0, started=0.0) as watch:
        signal.raise_signal(signal.SIGUSR1)
        assert watch._own_reason(validates=False) == signal.SIGUSR1 + 1


SRUN = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "12345",
}


def test_tasks_of_srun_are_ranks() -> None:
    assert read_launch_info(SRUN) == LaunchInfo(3, 4, 1, 2)


def test_torchrun_inside_a_task_of_srun_wins() -> None:
    inside = {**SRUN, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert read_launch_info(inside) == LaunchInfo(5, 8, 1, 4)


def test_a_batch_script_or_a_shell_in_an_allocation_is_a_single_process() -> None:
    batch = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert read_launch_info(batch) == LaunchInfo()
    assert read_launch_info({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) == LaunchInfo()


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_tasks_that_cannot_meet_are_refused(missing: str) -> None:
    environ = {name: value for name, value in SRUN.items() if name != missing}
    with pytest.raises(ConfigError, match=f"srun started 4 tasks, but {missing} is not set; submit"):
        read_launch_info(environ)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (0, "stopped by time limit before the first step; nothing to save yet"),
        (4, "stopped by time limit after step 4, saved; run the same command to resume"),
    ],
)
def test_what_is_not_saved_is_not_called_saved(
    step: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from nemo_lmpo import training
    from nemo_lmpo.train import main
    from nemo_lmpo.training.trainer import FitResult

    monkeypatch.setattr(training, "run", lambda *_, **__: FitResult(step, "time limit"))
    with caplog.at_level("INFO", logger="nemo_lmpo"):
        assert main(["--config-name", "lmpo_tiny", f"run_dir={tmp_path / 'run'}"]) == 0
    assert caplog.messages[-1] == said
