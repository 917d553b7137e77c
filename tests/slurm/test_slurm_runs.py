"""Jobs on a real Slurm: how they end, and that they learn the same as without it."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from pathlib import Path

import pytest
import torch

from nemo_lmpo.evaluate.environment import VARIABLE
from tests.slurm.stories import ROOT, STEPS, Job, Stories
from tests.system.stub_server import serving
from tests.system.test_evaluate import JUDGE_PROMPT

pytestmark = pytest.mark.slurm


def tensors(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, those of the optimizer included."""
    from nemo_lmpo.formats.archive import DirectoryFiles
    from nemo_lmpo.formats.distributed_reader import DistributedCheckpoint

    checkpoint = DistributedCheckpoint(DirectoryFiles(run / "checkpoints" / f"step_{step:07d}"), "state")
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert len(first) > 20
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def run_of(stories: Stories, name: str) -> Path:
    return stories.folder / "runs" / name


def restarts(run: Path) -> list[float]:
    """The metric of every training step."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry["job/restarts"] for entry in entries if "loss" in entry]


def last_line(job: Job) -> str:
    return job.log.rstrip().splitlines()[-1]


def test_two_tasks_on_a_node_learn_the_same_as_without_slurm(stories: Stories) -> None:
    job = stories["one_node"]
    assert job.succeeded, job.log[-3000:]
    assert "2 processes on node" in job.log
    assert "layout         TP 2 x PP 1 x CP 1 x DP 1 = 2 processes" in job.log
    assert last_line(job) == "slurm: all steps are done"
    assert not list(job.folder.glob("rank-*.log"))
    stories["without_slurm"]
    assert_same(tensors(run_of(stories, "one_node")), tensors(run_of(stories, "without_slurm_2")))


def test_the_launcher_validates_prints_and_submits(stories: Stories) -> None:
    said = stories["one_node"].notes["said"]
    assert "TP 2 x PP 1 x CP 1 x DP 1" in said
    assert "memory expected" in said
    line = next(line for line in said.splitlines() if line.startswith("sbatch "))
    assert "--nodes=1 --gpus-per-node=2 --ntasks-per-node=2" in line
    assert "/train.sbatch lmpo_tiny " in line


def test_two_nodes_of_which_one_fails(stories: Stories) -> None:
    job = stories["two_nodes"]
    assert job.succeeded, job.log[-3000:]
    assert job.ending["Restarts"] == "1"
    assert job.log.count("4 processes on node[3-4]") == 2
    assert (stories.folder / "launchers").read_text().split() == ["torchrun"] * 4 + ["srun"] * 4
    run = run_of(stories, "two_nodes")
    assert restarts(run)[0] == 0
    assert restarts(run)[-1] == 1
    assert len(restarts(run)) == STEPS
    stories["without_slurm"]
    assert_same(tensors(run), tensors(run_of(stories, "without_slurm_4")))


def test_sweep_trains_every_combination(stories: Stories) -> None:
    assert "there are only 2 combinations" in stories["sweep"].log
    first, second = (run_of(stories, f"lmpo_tiny_sweep/loss.lam-{lam}") for lam in ("0.05", "0.2"))
    assert "lam: 0.05" in (first / "config.yaml").read_text()
    assert "lam: 0.2" in (second / "config.yaml").read_text()
    weights, others = tensors(first), tensors(second)
    assert any(not torch.equal(weights[name], others[name]) for name in weights)


def test_time_limit_saves_requeues_and_finishes(stories: Stories) -> None:
    job = stories["limit"]
    assert job.succeeded, job.log[-3000:]
    assert "slurm: USR1: the time limit is near" in job.log
    # The signal can be too early for a slow machine; then the run looks at the clock by itself.
    assert re.search("stopped by (SIGUSR1|time limit) after step 4, saved", job.log)
    assert re.search("slurm: stopped (SIGUSR1|time limit); requeueing", job.log)
    assert "resumed after step 4" in job.log
    assert job.ending["Restarts"] == "1"
    run = run_of(stories, "limit")
    assert restarts(run) == [0, 0, 0, 0, 1, 1]
    stories["sweep"]
    assert_same(tensors(run), tensors(run_of(stories, "lmpo_tiny_sweep/loss.lam-0.2")))


def test_status_shows_step_loss_and_time_left(stories: Stories) -> None:
    notes = stories["limit"].notes
    header, line = notes["status"].rstrip().splitlines()
    assert header.split()[:4] == ["run", "state", "step", "loss"]
    assert line.split()[:3] == ["runs/limit", "running", f"3/{STEPS}"]
    assert stories["limit"].id in line.split()
    assert notes["status at the end"].splitlines()[1].split()[:3] == ["runs/limit", "done", f"{STEPS}/{STEPS}"]


def test_requeue_and_scancel_lose_nothing(stories: Stories) -> None:
    job = stories["interrupted"]
    run = run_of(stories, "interrupted")
    assert job.ending["JobState"] == "CANCELLED"
    assert "slurm: stopped SIGTERM; Slurm starts the job again" in job.log
    assert "resumed after step 3" in job.log
    assert "slurm: cancelled (stopped SIGTERM); not requeued" in job.log
    assert restarts(run) == [0, 0, 0, 1, 1]
    stories["sweep"]
    assert_same(tensors(run, 5), tensors(run_of(stories, "lmpo_tiny_sweep/loss.lam-0.2"), 5))


def test_an_error_in_the_recipe_fails_at_once(stories: Stories) -> None:
    job = stories["error"]
    assert (job.ending["JobState"], job.ending["ExitCode"], job.ending["Restarts"]) == ("FAILED", "1:0", "0")
    assert last_line(job).startswith("error: unknown key model.tensor_parallel; did you mean")
    assert "the job is not requeued" in job.log
    assert "error: unknown key" in (job.folder / "rank-0.log").read_text()


def test_three_crashes_in_a_row_end_the_job(stories: Stories) -> None:
    job = stories["crashes"]
    assert (job.ending["JobState"], job.ending["ExitCode"], job.ending["Restarts"]) == ("FAILED", "1:0", "2")
    assert job.log.count("=== job") == 3
    assert "attempts without a new checkpoint: 2 of 3" in job.log
    assert "3 attempts in a row without a new checkpoint, so the job is not requeued" in job.log
    assert "slurm: the end of rank-1.log:" in job.log
    assert last_line(job) == "RuntimeError: bad card"
    assert (job.folder / "rank-1.log").read_text().count("bad card") == 3
    assert {path.name for path in job.folder.glob("rank-*")} == {"rank-0.log", "rank-1.log"}


def test_a_user_stops_a_run_for_good(stories: Stories) -> None:
    job = stories["stop"]
    assert job.succeeded
    assert job.ending["Restarts"] == "0"
    assert last_line(job).startswith("slurm: saved and stopped as requested; not requeued")


def test_convert_and_generate(stories: Stories) -> None:
    job = stories["use"]
    assert job.succeeded, job.log[-3000:]
    assert (stories.folder / "exported" / "config.json").is_file()
    (answer,) = (stories.folder / "answers.jsonl").read_text().splitlines()
    assert isinstance(json.loads(answer), dict)


def test_an_evaluation_serves_the_model_and_stops_the_server(
    stories: Stories, shared_dir: Path, smollm2_dir: Path, tmp_path: Path
) -> None:
    data = shared_dir / "evaluation"
    if not os.environ.get(VARIABLE) or not (data / "arena_hard_v0.1_question.jsonl.gz").exists():
        pytest.skip(f"set {VARIABLE} (make eval-env), and have the evaluation data in `shared`")
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps(JUDGE_PROMPT))
    with serving() as judge:
        job_id = stories.submit(
            "evaluate.sbatch",
            *("arena_hard", "--model", str(smollm2_dir), "--judge-endpoint", judge.url, "--judge-prompt", str(prompt)),
            *("--limit", "2", "--output", "evals/smollm2", "--quiet"),
            options=stories.one_task(),
            NEMO_LMPO_SERVE=f"{sys.executable} {ROOT}/tests/system/stub_server.py",
            NEMO_LMPO_EVAL_DATA=str(data),
            **{VARIABLE: os.environ[VARIABLE]},
        )
        job = stories.finish(job_id)
    assert job.succeeded, job.log
    assert "slurm: server: ready" in job.log
    result = json.loads((stories.folder / "evals" / "smollm2" / "arena_hard" / "result.json").read_text())
    assert (result["n"], sum(result["judge"]["answered"].values())) == (2, 4)
    address = re.search(r"http://127.0.0.1:(\d+)", result["generation"]["endpoint"])
    assert address is not None
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(address[1]))) != 0  # the server ended with the job


def test_a_server_that_dies_ends_the_job_with_its_words(stories: Stories) -> None:
    python = stories.stand_in("exporting", 'echo "$PWD"')
    job_id = stories.submit(
        "evaluate.sbatch",
        *("arena_hard", "--model", "any", "--judge-endpoint", "http://localhost"),
        options=stories.one_task(),
        NEMO_LMPO_SERVE="echo no such card; false",
        NEMO_LMPO_PYTHON=python,
    )
    job = stories.finish(job_id)
    assert not job.succeeded
    assert "no such card" in job.log
    assert "the server ended before it was ready" in job.log
