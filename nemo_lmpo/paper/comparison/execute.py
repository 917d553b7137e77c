"""Trains and measures the runs that are not finished yet, each in a process of its own."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from nemo_lmpo.errors import TrainingError
from nemo_lmpo.monitor.console import format_duration
from nemo_lmpo.paper.comparison.runs import RunPlan
from nemo_lmpo.paper.comparison.scales import Scale
from nemo_lmpo.runtime.interruption import Interrupted, raising_when_interrupted
from nemo_lmpo.runtime.threads import Thread

LOG_FILE = "train.log"
STOPPED = 75
"""Exit status of a run that has steps left."""

_logger = logging.getLogger("nemo_lmpo")


def execute(plans: Sequence[RunPlan], scale: Scale, *, jobs: int, quiet: bool = False) -> list[RunPlan]:
    """Finish all runs.

    Args:
        plans: runs, each once; finished ones are passed over, and one that was cut off resumes.
        scale: how they are started and measured.
        jobs: how many at a time.
        quiet: no bar.

    Returns:
        The runs that failed; their log says why.
    """
    waiting = [plan for plan in plans if not plan.finished]
    done = len(plans) - len(waiting)
    if not waiting:
        return []
    context = _process_context(scale)
    failed = []
    active: dict[Any, tuple[Any, RunPlan, float]] = {}
    hidden = True if quiet else None
    with logging_redirect_tqdm(), tqdm(total=len(waiting) + done, initial=done, unit="run", disable=hidden) as bar:
        try:
            while waiting or active:
                while waiting and len(active) < jobs:
                    plan = waiting.pop(0)
                    process = context.Process(target=_run, args=(plan, scale, dict(os.environ)))
                    process.start()
                    active[process.sentinel] = (process, plan, time.monotonic())
                for sentinel in wait(list(active)):
                    process, plan, started = active.pop(sentinel)
                    process.join()
                    if process.exitcode:
                        failed.append(plan)
                    _report(plan, process.exitcode, time.monotonic() - started)
                    bar.update()
        finally:
            for process, _, _ in active.values():
                process.terminate()
            for process, _, _ in active.values():
                process.join()
    return failed


def make_start_model(plan: RunPlan, scale: Scale, *, quiet: bool) -> None:
    """Train the start model and write it as a Hugging Face directory `hf/` in its run's directory.

    Raises:
        TrainingError: it could not be trained.
    """
    from nemo_lmpo.formats.conversion import plan as plan_conversion
    from nemo_lmpo.formats.conversion import write_huggingface
    from nemo_lmpo.formats.find_model import find_model
    from nemo_lmpo.formats.model_files import open_model

    if not plan.finished:
        _logger.info("training the start model")
        if execute([plan], scale, jobs=1, quiet=quiet):
            raise TrainingError(f"the start model could not be trained; see {plan.directory / LOG_FILE}")
    if not plan.start_model.exists():
        write_huggingface(plan_conversion(open_model(find_model(plan.directory).path), plan.start_model))


def _report(plan: RunPlan, exit_code: int, seconds: float) -> None:
    what = f"{plan.variant.label}, seed {plan.seed}"
    if exit_code:
        _logger.error("failed: %s (exit status %d; see %s)", what, exit_code, plan.directory / LOG_FILE)
    else:
        _logger.info("finished: %s in %s", what, format_duration(seconds))


def _may_fork() -> bool:
    """Where there is no GPU, whose driver does not survive a fork."""
    return sys.platform.startswith("linux") and not Path("/dev/nvidiactl").exists()


def _process_context(scale: Scale) -> Any:
    """How runs are started.

    A forked process has its imports already; tiny runs would import for as long as they train. The fork is that of a
    server without threads of its own: the children of a process that has computed inherit locks nobody releases.
    """
    if scale.separate or not _may_fork():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nemo_lmpo.paper.comparison.preload"])
    return context


def _run(plan: RunPlan, scale: Scale, environment: dict[str, str]) -> None:
    """Train and measure one run; what it prints goes to its log. Ends with the comparison, however that ends."""
    Thread(_end_with_the_comparison, name="end-with-the-comparison").start()
    os.environ.update(environment)  # a fork server has that of its start
    plan.directory.mkdir(parents=True, exist_ok=True)
    log = os.open(plan.directory / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = _train_separately(plan) if scale.separate else _train_here(plan)
    if status == 0:
        from nemo_lmpo.paper.comparison.measure import measure
        from nemo_lmpo.report.read import read_run

        # A run that was told to stop saves and ends well, too, but has steps left.
        if read_run(plan.directory).finished:
            measure(plan.directory, scale)
        else:
            status = STOPPED
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)


def _end_with_the_comparison() -> None:
    """Once its process is gone, which can be killed, ask this one to save and end, as the comparison itself would."""
    comparison = multiprocessing.parent_process()
    if comparison is not None:
        wait([comparison.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _train_here(plan: RunPlan) -> int:
    from nemo_lmpo.train import main

    return main([*plan.arguments(), "logging.progress_bar=false"])


def _train_separately(plan: RunPlan) -> int:
    launcher = Path(sys.executable).with_name("torchrun")
    with raising_when_interrupted(), subprocess.Popen([str(launcher), *plan.torchrun_arguments()]) as process:
        try:
            return process.wait()
        except Interrupted as interrupted:
            process.terminate()  # it passes the signal on to its ranks, which save
            process.wait()
            return interrupted.status
