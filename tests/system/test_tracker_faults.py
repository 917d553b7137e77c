"""Trackers that fail or hang at any moment: training continues to its end, saves, and says so in one line."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from nemo_lmpo.config.schema import LoggingConfig, MlflowConfig, WandbConfig
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.monitor import observer
from nemo_lmpo.monitor.metrics_log import MetricsLog
from nemo_lmpo.monitor.observer import Harmless, Observer
from nemo_lmpo.monitor.samples import Sample
from nemo_lmpo.runtime.run_files import saved_steps
from tests.distributed.training_runs import metrics_of
from tests.distributed.workers import run_workers
from tests.system.processes import SMALL, training
from tests.system.tracking_server import FAULTS, TrackingServer, tracking_server

SAMPLES = [Sample("<user> a", "b", 2, True)]
PHASES = ("resume", "log", "samples", "close")
STEPS = 4


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What takes minutes takes a moment; and what failed here is not a matter of later tests."""
    monkeypatch.setattr(observer, "START_SECONDS", 3.0)
    monkeypatch.setattr(observer, "CLOSE_SECONDS", 2.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    observer._FAILED.clear()


def follow_a_run(run_dir: Path, config: LoggingConfig, phase: str, fail: Callable[[], None]) -> None:
    """A run that is begun, interrupted and resumed; at ``phase`` of the second part the fault begins."""

    def reach(now: str) -> None:
        if now == phase:
            fail()

    first = MetricsLog(run_dir, config, settings={"name": "t"}, resume_step=0, total_steps=STEPS)
    first.log(1, {"loss": 1.0})
    first.close()
    reach("resume")
    log = MetricsLog(run_dir, config, settings={"name": "t"}, resume_step=1, total_steps=STEPS)
    for step in range(2, STEPS + 1):
        reach("log")
        log.log(step, {"loss": 1.0 / step})
        reach("samples")
        log.log_samples(step, SAMPLES)
    reach("close")
    log.close()


def check(run_dir: Path, records: list[logging.LogRecord], tracker: str) -> None:
    """Nothing is missing in the run's own files, and one printable line says what is missing elsewhere."""
    assert [line["step"] for line in metrics_of(run_dir)] == list(range(1, STEPS + 1))
    assert len((run_dir / "samples.jsonl").read_text().splitlines()) == STEPS - 1
    warnings = [record.getMessage() for record in records if record.levelno >= logging.WARNING]
    (said,) = [line for line in warnings if line.startswith(f"{tracker} does not take all values")]
    assert said.isprintable()
    assert len(warnings) == 1, warnings


class FakeLogger:
    """A writer or Lightning logger whose methods all fail once they shall."""

    def __init__(self, failing: list[Callable[[], object]]) -> None:
        self.failing = failing

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: object, **kwargs: object) -> Any:
        for fail in self.failing:
            fail()
        return self


def raising(error: BaseException) -> Callable[[], object]:
    def fail() -> object:
        raise error

    return fail


KINDS = {
    "OSError": raising(OSError(errno.ENOSPC, "No space left on device")),
    "ValueError": raising(ValueError("\x1b[2J\r\nforged line")),
    "no text": raising(RuntimeError()),
    "SystemExit": raising(SystemExit(3)),
    "MemoryError": raising(MemoryError()),
    "hang": lambda: time.sleep(3600),
}
TRACKERS = {
    "TensorBoard": LoggingConfig(tensorboard=True),
    "W&B": LoggingConfig(tensorboard=False, wandb=WandbConfig(project="p")),
    "MLflow": LoggingConfig(tensorboard=False, mlflow=MlflowConfig("e", tracking_uri="http://127.0.0.1:9")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("tracker", TRACKERS)
def test_whatever_a_tracker_raises(
    tracker: str, phase: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    import lightning.pytorch.loggers as loggers
    import torch.utils.tensorboard as writers

    monkeypatch.setattr(observer, "START_SECONDS", 0.2)
    monkeypatch.setattr(observer, "CLOSE_SECONDS", 0.2)
    failing: list[Callable[[], object]] = []

    def make(*args: object, **kwargs: object) -> FakeLogger:
        logger = FakeLogger(failing)
        logger()
        return logger

    monkeypatch.setattr(writers, "SummaryWriter", make)
    for name in ("WandbLogger", "MLFlowLogger"):
        monkeypatch.setattr(loggers, name, make)
    follow_a_run(tmp_path, TRACKERS[tracker], phase, lambda: failing.append(KINDS[kind]))
    check(tmp_path, caplog.records, tracker)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("fault", FAULTS)
def test_an_mlflow_server_that_fails(fault: str, phase: str, tmp_path: Path, caplog: Any) -> None:
    with tracking_server() as server:
        config = LoggingConfig(tensorboard=False, mlflow=MlflowConfig("e", tracking_uri=server.url))
        follow_a_run(tmp_path, config, phase, lambda: server.fail(fault))
        assert (1, "loss", 1.0) in server.metrics
    check(tmp_path, caplog.records, "MLflow")


def test_a_server_that_comes_back_gets_what_follows(tmp_path: Path, caplog: Any) -> None:
    with tracking_server() as server:
        config = LoggingConfig(tensorboard=False, mlflow=MlflowConfig("e", tracking_uri=server.url))
        log = MetricsLog(tmp_path, config, settings={}, resume_step=0)
        server.fail("503")
        log.log(1, {"loss": 1.0})
        while not caplog.records:
            time.sleep(0.01)
        server.fail("")
        log.log(2, {"loss": 2.0})
        log.close()
        assert server.metrics == [(2, "loss", 2.0)]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_new_run_is_refused_before_any_work(fault: str, tmp_path: Path) -> None:
    with tracking_server() as server:
        server.fail(fault)
        config = LoggingConfig(tensorboard=False, mlflow=MlflowConfig("e", tracking_uri=server.url))
        with pytest.raises(
            ConfigError, match=r"logging\.mlflow\.experiment='e': MLflow cannot start \(.*unset"
        ) as info:
            MetricsLog(tmp_path, config, settings={}, resume_step=0)
        assert str(info.value).isprintable()
    assert not (tmp_path / "metrics.jsonl").exists()


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nothing that TensorBoard writes reaches the disk."""
    from tensorboard.compat.tensorflow_stub.io import gfile

    monkeypatch.setattr(gfile.GFile, "write", lambda *_: raising(OSError(errno.ENOSPC, "No space left on device"))())
    monkeypatch.setattr(gfile.GFile, "flush", lambda *_: raising(OSError(errno.ENOSPC, "No space left on device"))())


@pytest.mark.parametrize("phase", PHASES)
def test_tensorboard_on_a_full_disk(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    follow_a_run(tmp_path, LoggingConfig(tensorboard=True), phase, lambda: full_disk(monkeypatch))
    check(tmp_path, caplog.records, "TensorBoard")
    assert "Traceback" not in capfd.readouterr().err


def follow_with_wandb(launch: object, run_dir: str, phase: str, number: int) -> list[str]:
    """In a process of its own, as W&B's service is one per process; what was warned of."""
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
    os.environ.pop("WANDB_SERVICE", None)
    observer.CLOSE_SECONDS, observer.START_SECONDS = 5.0, 60.0
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign, assignment]
    logging.getLogger("nemo_lmpo").addHandler(handler)
    stopped: list[psutil.Process] = []

    def fail() -> None:
        for process in psutil.Process().children(recursive=True):
            process.send_signal(number)
            stopped.append(process)

    follow_a_run(Path(run_dir), TRACKERS["W&B"], phase, fail)
    for process in stopped:
        if process.is_running():
            process.kill()
    check(Path(run_dir), records, "W&B")
    return [record.getMessage() for record in records]


@pytest.mark.parametrize(("phase", "number"), [("log", signal.SIGKILL), ("close", signal.SIGSTOP)])
def test_the_wandb_service_is_killed_or_stopped(phase: str, number: signal.Signals, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run_workers(1, follow_with_wandb, str(tmp_path), phase, int(number))


def test_a_slow_tracker_does_not_hold_up_steps(caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer, "MOST_WAITING", 3)
    monkeypatch.setattr(observer, "CALL_SECONDS", 0.0)
    watching = Observer("slow")
    made: list[int] = []
    go = threading.Event()
    watching.tell(go.wait)
    while watching._calls:
        time.sleep(0.001)
    for number in range(10):
        watching.tell(functools.partial(made.append, number))
    go.set()
    watching.finish(lambda: made.append(-1))
    watching.wait(time.monotonic() + 10)
    assert made == [7, 8, 9, -1], "the newest"
    assert len(caplog.records) == 1


def test_ctrl_c_is_no_fault() -> None:
    with pytest.raises(KeyboardInterrupt), Harmless("it", instead="nothing"):
        raise KeyboardInterrupt


def test_training_ends_well_without_its_tracker(tmp_path: Path) -> None:
    """The command itself: MLflow's server goes down after the first step."""
    with ExitStack() as stack:
        server: TrackingServer = stack.enter_context(tracking_server())
        options = (
            *("--config-name", "lmpo_tiny", *SMALL, "run_dir=run", "trainer.max_steps=6", "logging.report=true"),
            *("checkpoint.save_interval=3", "logging.mlflow.experiment=e", f"logging.mlflow.tracking_uri={server.url}"),
        )
        environment = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
        process = stack.enter_context(training(options, tmp_path, environment=environment))
        while not server.metrics:
            assert process.is_alive(), (tmp_path / "output").read_text()
            time.sleep(0.005)
        server.fail("503")
        process.join(timeout=120)
        output = (tmp_path / "output").read_text()
        assert process.exitcode == 0, output
    assert output.count("MLflow does not take all values") == 1
    assert "Traceback" not in output
    assert [line["step"] for line in metrics_of(tmp_path / "run") if "loss" in line] == list(range(1, 7))
    assert saved_steps(tmp_path / "run" / "checkpoints") == [3, 6]
    assert (tmp_path / "run" / "report.html").exists()


LEAVE = """
import atexit, sys, time
from nemo_lmpo import train
from nemo_lmpo.monitor.observer import Observer
def run(options, mode, started):
    atexit.register(time.sleep, 3600)
    Observer("tracker").fail("it hangs")
    return 0
train._run = run
sys.exit(train.main(["--list"]))
"""


def test_a_tracker_that_hangs_does_not_keep_the_process() -> None:
    """W&B waits for its service when the process ends."""
    result = subprocess.run([sys.executable, "-c", LEAVE], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0
    assert json.dumps(result.stderr).count("tracker does not take all values") == 1
