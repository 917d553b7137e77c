"""What happens to the jobs that the tests look at: each story submits one, acts on it, and waits for its end.

Stories run side by side, since most of their time is waiting, and are told once for all tests.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_lmpo.runtime.launch import LaunchInfo
from tests.distributed.workers import run_workers
from tests.slurm.local_slurm import LocalSlurm
from tests.slurm.sweep_story import ROOM, tell_sweep_story

ROOT = Path(__file__).resolve().parent.parent.parent
SLURM = ROOT / "slurm"
STEPS = 6
PATIENCE = 500.0
"""Seconds that a story waits for one thing; only machines that are overloaded need it."""
# Every process alone takes seconds of CPU time to start, so runs are as short as they can be.
RECIPE = (
    "lmpo_tiny",
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=0",
    "trainer.num_threads=1",
    "model.global_batch_size=16",
    "data.validation.limit=16",
    "logging.report=false",
    "logging.tensorboard=false",
)
SPLIT = ("model.tensor_model_parallel_size=2",)
# The story of a failing node has two nodes to itself.
QUIET_NODES = "node1,node2"
LOSING_NODES = "node3,node4"
OTHERS = f"{LOSING_NODES},{ROOM}"


def train_without_slurm(launch: LaunchInfo, overrides: list[str]) -> None:
    """What `python -m nemo_lmpo.train` does after reading its arguments."""
    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.train import _train

    _train(load_recipe(RECIPE[0], overrides), launch, time.time())


@dataclass
class Job:
    """A job that has ended."""

    id: str
    log: str
    ending: dict[str, str]
    folder: Path
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def succeeded(self) -> bool:
        return self.ending["JobState"] == "COMPLETED" and self.ending["ExitCode"] == "0:0"


class Stories:
    """Tells every story once."""

    def __init__(self, cluster: LocalSlurm, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.pool = ThreadPoolExecutor(max_workers=10)
        self.limit_is_held = threading.Event()
        self.ending = threading.Event()
        python = folder / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/slurm/held_python.py "$@"\n')
        python.chmod(0o755)
        self.variables: dict[str, Any] = {
            "NEMO_LMPO_PYTHON": str(python),
            "NEMO_LMPO_SLURM_DIR": str(SLURM),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        # Two lines of stories that need the processor, so that none starves; the others mostly wait.
        self._results = {"limit": self.pool.submit(self._limit), "crashes": self.pool.submit(self._crashes)}
        self._results["stop"] = self.pool.submit(self._stop)
        self._results["sweep_tasks"] = self.pool.submit(tell_sweep_story, self)
        self._line(["without_slurm", "two_nodes", "one_node"])
        self._line(["sweep", "interrupted", "error", "use"])

    def __getitem__(self, name: str) -> Job:
        return self._results[name].result(timeout=3 * PATIENCE)

    def close(self) -> None:
        """Let waiting stories fail at once."""
        self.ending.set()
        self.pool.shutdown(wait=True, cancel_futures=True)

    def _line(self, names: list[str]) -> None:
        promises: dict[str, Future[Job]] = {name: Future() for name in names}
        self._results.update(promises)

        def tell() -> None:
            # The job with a time limit of minutes gets the processor first.
            self.limit_is_held.wait(150)
            for name in names:
                try:
                    promises[name].set_result(getattr(self, f"_{name}")())
                except BaseException as error:
                    promises[name].set_exception(error)

        self.pool.submit(tell)

    # ---- helpers

    def submit(self, template: str, *arguments: str, options: tuple[str, ...] = (), **variables: str) -> str:
        """Submit a template; the job's number."""
        command = ("sbatch", "--parsable", *options, str(SLURM / template), *arguments)
        given: dict[str, Any] = {**self.variables, **variables}
        return self.cluster.run(*command, cwd=self.folder, **given).strip()

    def finish(self, job_id: str, **notes: str) -> Job:
        """Wait for a job's end."""
        ending = self.cluster.wait_until_ended(job_id, PATIENCE)
        return Job(job_id, self.log(job_id), ending, self.folder / "runs" / "slurm" / job_id, notes)

    def log(self, job_id: str) -> str:
        logs = (*self.folder.glob(f"*-{job_id}.log"), *self.folder.glob(f"*-{job_id}_*.log"))  # not of job 10 for 1
        return "".join(path.read_text() for path in logs)

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if self.ending.is_set() or time.monotonic() > deadline:
                raise AssertionError(f"waited for {what} in vain")
            time.sleep(0.2)

    def brake(self, name: str) -> Path:
        path = self.folder / f"brake-{name}"
        path.touch()
        return path

    def steps(self, run: str) -> int:
        """Lines of a run's metrics."""
        path = self.folder / "runs" / run / "metrics.jsonl"
        return len(path.read_bytes().splitlines()) if path.is_file() else 0

    def one_task(self, *options: str) -> tuple[str, ...]:
        return ("--gpus-per-node=1", "--ntasks-per-node=1", f"--nodelist={QUIET_NODES.split(',')[0]}", *options)

    def module(self, *arguments: str) -> str:
        """Output of `python -m ARGUMENTS` on the "login node"."""
        return self.cluster.run(sys.executable, "-m", *arguments, cwd=self.folder, **self.variables)

    # ---- stories

    def _without_slurm(self) -> Job:
        """The layouts of two and of four processes, trained by processes of this machine."""
        for count in (2, 4):
            overrides = [*RECIPE[1:], *SPLIT, f"run_dir={self.folder}/runs/without_slurm_{count}"]
            run_workers(count, train_without_slurm, overrides, timeout=PATIENCE)
        return Job("", "", {}, self.folder)

    def _one_node(self) -> Job:
        """Two tasks through the launcher, and so through srun."""
        options = ("--gpus-per-node=2", f"--sbatch=--exclude={OTHERS}")
        said = self.module("nemo_lmpo.slurm", "submit", *RECIPE, *SPLIT, "run_dir=runs/one_node", *options)
        job_id = said.split("submitted job ")[1].split(";")[0]
        return self.finish(job_id, said=said)

    def _two_nodes(self) -> Job:
        """Two nodes with two tasks each by torchrun; one node fails before step 4, and srun starts the second turn."""
        hold = self.brake("two_nodes")
        settings = self.folder / "cluster.env"  # each turn reads it anew
        settings.write_text("NEMO_LMPO_LAUNCHER=torchrun\n")
        job_id = self.submit(
            "train_multinode.sbatch",
            *RECIPE,
            *SPLIT,
            "run_dir=runs/two_nodes",
            options=("--gpus-per-node=2", "--ntasks-per-node=2", f"--nodelist={LOSING_NODES}"),
            NEMO_LMPO_CLUSTER_ENV=str(settings),
            TEST_LAUNCHERS=str(self.folder / "launchers"),
            TEST_HOLD=f"3={hold}",
        )
        self.wait_for(lambda: self.steps("two_nodes") == 3, "three steps on two nodes")
        self.cluster.run("scontrol", "update", "nodename=node4", "state=down", "reason=test")
        self.wait_for(lambda: "TERM" in self.log(job_id), "the end of the node")
        settings.write_text("NEMO_LMPO_LAUNCHER=srun\n")
        hold.unlink()
        self.wait_for(lambda: self.cluster.job(job_id)["JobState"] == "PENDING", "the job in the queue again")
        # The node may have come back by itself, on its next report.
        self.cluster.run("scontrol", "update", "nodename=node4", "state=resume", check=False)
        return self.finish(job_id)

    def _limit(self) -> Job:
        """One task; Slurm's signal comes before step 4."""
        hold = self.brake("limit")
        job_id = self.submit(
            "train.sbatch",
            *RECIPE,
            "run_dir=runs/limit",
            "checkpoint.save_interval=0",
            # Slurm looks at its clock every half minute, and sends the signal 60 to 90 s after the start.
            options=("--time=3", "--signal=B:USR1@120", *self.one_task()),
            NEMO_LMPO_MARGIN_SECONDS="20",
            TEST_HOLD=f"3={hold}",
        )
        self.wait_for(lambda: self.steps("limit") == 3, "three steps", seconds=150)
        signalled_early = "slurm: USR1" in self.log(job_id)
        self.limit_is_held.set()
        status = self.module("nemo_lmpo.slurm", "status", "runs/limit")
        if signalled_early:  # on a slow machine, before the trainer could listen; then it looks at the clock itself
            end = json.loads((self.folder / "runs" / "limit" / "job.json").read_text())["ends_at"]
            self.wait_for(lambda: time.time() > end - 20, "the time at which the run stops by itself")
        self.wait_for(lambda: "slurm: USR1" in self.log(job_id), "Slurm's signal")
        hold.unlink()
        # One turn with a limit is enough; on a slow machine the second would meet it, too.
        self.wait_for(lambda: self._has_more_time(job_id), "the job in the queue again, with more time")
        job = self.finish(job_id, status=status)
        job.notes["status at the end"] = self.module("nemo_lmpo.slurm", "status", "runs/limit")
        return job

    def _has_more_time(self, job_id: str) -> bool:
        if self.cluster.job(job_id).get("JobState") == "PENDING":
            self.cluster.run("scontrol", "update", f"JobId={job_id}", "TimeLimit=60", check=False)
        return self.cluster.job(job_id).get("TimeLimit") == "01:00:00"

    def _sweep(self) -> Job:
        """Two values of lambda as a job array; the second is the recipe's own, and keeps all its checkpoints."""
        job_id = self.submit(
            "sweep.sbatch",
            *RECIPE,
            "loss.lam=0.05,0.2",
            "checkpoint.save_interval=1",
            "checkpoint.keep_last=9",
            options=("--array=0-2", *self.one_task()),
        )
        for task in range(3):
            job = self.finish(f"{job_id}_{task}")
            assert job.succeeded, job.log[-3000:]
        return job

    def _interrupted(self) -> Job:
        """`scontrol requeue` before step 3, `scancel` before step 5."""
        first, second = self.brake("requeue"), self.brake("cancel")
        job_id = self.submit(
            "train.sbatch",
            *RECIPE,
            "run_dir=runs/interrupted",
            "checkpoint.save_interval=0",
            options=self.one_task(),
            TEST_HOLD=f"2={first},4={second}",
        )
        self.wait_for(lambda: self.steps("interrupted") == 2, "two steps")
        self.cluster.run("scontrol", "requeue", job_id)
        self.wait_for(lambda: "slurm: TERM" in self.log(job_id), "the end of the first turn")
        first.unlink()
        waiter = self.pool.submit(self.finish, job_id)
        self.wait_for(lambda: self.steps("interrupted") == 4, "two more steps")
        self.cluster.run("scancel", job_id)
        self.wait_for(lambda: self.log(job_id).count("slurm: TERM") == 2, "the end of the second turn")
        second.unlink()
        return waiter.result()

    def _error(self) -> Job:
        """A setting that does not exist."""
        return self.finish(self.submit("train.sbatch", *RECIPE, "model.tensor_parallel=2", options=self.one_task()))

    def _use(self) -> Job:
        """Convert and generate with a checkpoint that a job trained."""
        checkpoint = f"runs/lmpo_tiny_sweep/loss.lam-0.2/checkpoints/step_{STEPS:07d}"
        (self.folder / "prompts.jsonl").write_text('{"prompt": "sort b a"}\n')
        cpus = f"--exclude={OTHERS}"
        convert = self.submit(
            "convert.sbatch", "nemo-to-hf", "--input", checkpoint, "--output", "exported", options=(cpus,)
        )
        generate = self.submit(
            "generate.sbatch",
            *("--checkpoint", "exported", "--prompts", "prompts.jsonl", "--output", "answers.jsonl"),
            *("--max-new-tokens", "4", "--device", "cpu"),
            options=(cpus, f"--dependency=afterok:{convert}"),
        )
        converted = self.finish(convert)
        assert converted.succeeded, converted.log
        return self.finish(generate)

    # ---- stories with a stand-in for the trainer, which needs no processor time

    def stand_in(self, name: str, script: str) -> str:
        path = self.folder / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
        return str(path)

    def _crashes(self) -> Job:
        """Rank 1 breaks before the first step, every time."""
        script = 'if [ "$SLURM_PROCID" = 1 ]; then echo "RuntimeError: bad card" >&2; exit 3; fi; sleep 60'
        job_id = self.submit(
            "train.sbatch",
            *RECIPE,
            options=("--gpus-per-node=2", "--ntasks-per-node=2", f"--exclude={OTHERS}"),
            NEMO_LMPO_PYTHON=self.stand_in("crashing", script),
        )
        return self.finish(job_id)

    def _stop(self) -> Job:
        """A user asks the batch script to save and end."""
        script = """trap 'echo "stopped SIGTERM" >"$NEMO_LMPO_JOB_DIR/outcome"; exit 0' TERM
            echo training; while :; do sleep 0.1; done"""
        job_id = self.submit(
            "train.sbatch", *RECIPE, options=self.one_task(), NEMO_LMPO_PYTHON=self.stand_in("stopping", script)
        )
        self.wait_for(lambda: "training" in self.log(job_id), "the stand-in")
        self.cluster.run("scancel", "--batch", "--signal=TERM", job_id)
        return self.finish(job_id)
