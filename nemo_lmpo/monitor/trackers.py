"""Where metrics go besides `metrics.jsonl`: TensorBoard, Weights & Biases and MLflow.

The last two go through Lightning's loggers.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_lmpo.config.schema import LoggingConfig, MlflowConfig, WandbConfig
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.monitor import observer
from nemo_lmpo.monitor.observer import Observer
from nemo_lmpo.monitor.samples import Sample, as_markdown
from nemo_lmpo.runtime import run_files
from nemo_lmpo.runtime.credentials import Address, whole
from nemo_lmpo.runtime.files import replace_file

if TYPE_CHECKING:
    from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

MLFLOW_ID_FILE = "mlflow_id"
_COLUMNS = tuple(field.name for field in fields(Sample))
_MLFLOW_LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3"}
"""What MLflow's client takes unless the user set it: by itself it waits 120 seconds, and tries eight times."""


@dataclass(frozen=True)
class _Open:
    """A tracker that is open."""

    log: Callable[[int, Mapping[str, float]], object]
    """How the metrics of a step are shown there."""
    log_samples: Callable[[int, Sequence[Sample]], object]
    """How answers are shown there, by step."""
    finish: Callable[[], object]


@dataclass(frozen=True)
class _Wanted:
    """A tracker that the configuration asks for."""

    name: str
    setting: str
    remedy: str
    """Where it cannot start."""
    begun: bool
    """Whether this run has used it before: it is resumed, and continues without a tracker that is gone meanwhile."""
    open: Callable[[], _Open]


class Trackers:
    """The trackers that a run asks for, each behind an :class:`~nemo_lmpo.monitor.observer.Observer`.

    To be made on global rank 0 only.
    """

    def __init__(self, run_dir: Path, config: LoggingConfig, *, settings: Mapping[str, Any], resume_step: int) -> None:
        """Start them, or go on with the runs whose ids are kept in the run directory.

        Args:
            run_dir: the run's directory, made if missing once all packages are there.
            config: which trackers.
            settings: the resolved configuration, which W&B and MLflow show.
            resume_step: finished steps of the checkpoint that is resumed; 0 for a new run.

        Raises:
            ConfigError: one is configured, but its package is missing, or it cannot start for a new run.
        """
        wanted = _wanted(run_dir, config, settings, resume_step)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._open: list[tuple[Observer, _Open]] = []
        for tracker in wanted:
            watching = Observer(tracker.name)
            try:
                self._open.append((watching, watching.ask(tracker.open, seconds=observer.START_SECONDS)))
            except observer.WHATEVER as error:
                if not tracker.begun:
                    self.close()
                    raise _cannot_start(tracker, error) from error
                watching.fail(observer.reason(error))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line; steps that a tracker saw before an interruption are repeated exactly."""
        values = dict(metrics)
        for watching, tracker in self._open:
            watching.tell(partial(tracker.log, step, values))

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """The answers of a validation; as :meth:`log`, repeated ones take the place of those before."""
        for watching, tracker in self._open:
            watching.tell(partial(tracker.log_samples, step, samples))

    def close(self) -> None:
        """Finish all of them, within a limited time; can be called twice."""
        closing, self._open = self._open, []
        for watching, tracker in closing:
            watching.finish(tracker.finish)
        until = time.monotonic() + observer.CLOSE_SECONDS
        for watching, _ in closing:
            watching.wait(until)


def _cannot_start(tracker: _Wanted, error: BaseException) -> ConfigError:
    if isinstance(error, ConfigError):
        return error
    return ConfigError(f"{tracker.setting}: {tracker.name} cannot start ({observer.reason(error)}); {tracker.remedy}")


def _wanted(run_dir: Path, config: LoggingConfig, settings: Mapping[str, Any], resume_step: int) -> list[_Wanted]:
    """What the configuration asks for.

    Raises:
        ConfigError: a package or a necessary setting is missing.
    """
    found: list[_Wanted] = []
    if config.wandb.project:
        setting = f"logging.wandb.project={config.wandb.project!r}"
        _require("wandb", setting)
        remedy = "run `wandb login`, set WANDB_MODE=offline, or unset logging.wandb.project"
        begun = resume_step > 0 or bool(_kept_id(run_dir / run_files.WANDB_ID))
        found.append(_Wanted("W&B", setting, remedy, begun, lambda: _wandb(run_dir, config.wandb, settings)))
    if config.mlflow.experiment:
        setting = f"logging.mlflow.experiment={config.mlflow.experiment!r}"
        _require("mlflow", setting)
        uri = _mlflow_uri(config.mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"))
        if not uri:
            raise ConfigError(f"{setting} needs a server; set logging.mlflow.tracking_uri or MLFLOW_TRACKING_URI")
        remedy = "correct logging.mlflow.tracking_uri, or unset logging.mlflow.experiment"
        begun = resume_step > 0 or bool(_kept_id(run_dir / MLFLOW_ID_FILE))
        found.append(_Wanted("MLflow", setting, remedy, begun, lambda: _mlflow(run_dir, config.mlflow, settings, uri)))
    if config.tensorboard:
        remedy = f"free the disk of {run_dir}, or set logging.tensorboard=false"
        setting = "logging.tensorboard=true"
        found.append(
            _Wanted("TensorBoard", setting, remedy, resume_step > 0, lambda: _tensorboard(run_dir, resume_step))
        )
    return found


def _mlflow_uri(given: str | None) -> str:
    """Where MLflow's client finds its server.

    The client prints and logs the address of an HTTP server, so it gets user and password by their variables.

    Raises:
        ConfigError: the address has a query, which MLflow cannot send.
    """
    uri = whole(given or "")
    if not uri.startswith(("http://", "https://")):
        return uri
    try:
        address = Address.of(uri)
    except ValueError:
        return uri
    if address.query:
        raise ConfigError(
            f"logging.mlflow.tracking_uri={address.shown} has a query, which MLflow cannot send; set "
            "MLFLOW_TRACKING_TOKEN to the token instead"
        )
    for name, value in (("USERNAME", address.user), ("PASSWORD", address.password)):
        if value:
            os.environ[f"MLFLOW_TRACKING_{name}"] = value
    return address.shown


def _require(package: str, setting: str) -> None:
    try:
        __import__(package)
    except ImportError:
        raise ConfigError(
            f"{setting} needs the package {package}; run `pip install 'nemo-lmpo[{package}]'` or unset it"
        ) from None


def _tensorboard(run_dir: Path, resume_step: int) -> _Open:
    from torch.utils.tensorboard import SummaryWriter

    _keep_writers_quiet()
    # Lightning's logger would be the same writer; importing it takes two seconds.
    # TensorBoard hides what earlier files have of this step and later ones.
    writer = SummaryWriter(run_dir / run_files.TENSORBOARD, purge_step=resume_step + 1)

    def log(step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    def log_samples(step: int, samples: Sequence[Sample]) -> None:
        for index, sample in enumerate(samples):
            writer.add_text(f"val/samples/{index}", as_markdown(sample), step)

    def finish() -> None:
        writer.flush()
        writer.close()

    return _Open(log, log_samples, finish)


@cache
def _keep_writers_quiet() -> None:
    """TensorBoard's writing thread hands its error to the next call, and also prints it as a traceback: not that."""
    show = threading.excepthook

    def show_others(arguments: threading.ExceptHookArgs) -> None:
        if type(arguments.thread).__name__ != "_AsyncWriterThread":
            show(arguments)

    threading.excepthook = show_others


def _wandb(run_dir: Path, config: WandbConfig, settings: Mapping[str, Any]) -> _Open:
    from lightning.pytorch.loggers import WandbLogger

    run_id = _kept_id(run_dir / run_files.WANDB_ID) or secrets.token_hex(4)
    logger: WandbLogger = WandbLogger(
        project=config.project,
        name=config.name or run_dir.name,
        entity=config.entity,
        save_dir=run_dir,
        id=run_id,
        config=dict(settings),
    )
    logger.experiment  # noqa: B018  # starts the run
    replace_file(run_dir / run_files.WANDB_ID, f"{run_id}\n")

    def log_samples(step: int, samples: Sequence[Sample]) -> None:
        rows = [[step, *asdict(sample).values()] for sample in samples]
        logger.log_text("val/samples", columns=["step", *_COLUMNS], data=rows, step=step)

    return _Open(partial(_log_metrics, logger), log_samples, logger.experiment.finish)


def _mlflow(run_dir: Path, config: MlflowConfig, settings: Mapping[str, Any], uri: str) -> _Open:
    from lightning.pytorch.loggers import MLFlowLogger

    for name, value in _MLFLOW_LIMITS.items():
        os.environ.setdefault(name, value)
    # Each of its tries that fails would be a line on the terminal.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    kept = _kept_id(run_dir / MLFLOW_ID_FILE)
    logger: MLFlowLogger = MLFlowLogger(
        experiment_name=str(config.experiment),
        run_name=config.name or run_dir.name,
        tracking_uri=uri,
        run_id=kept or None,
    )
    if not kept:
        logger.log_hyperparams(dict(settings))
    replace_file(run_dir / MLFLOW_ID_FILE, f"{logger.run_id}\n")

    def log_samples(step: int, samples: Sequence[Sample]) -> None:
        # A file per step: MLflow's tables only grow, and a resumed run would repeat its lines in one.
        table = [asdict(sample) for sample in samples]
        logger.experiment.log_dict(logger.run_id, {"step": step, "samples": table}, f"samples/step_{step:07d}.json")

    return _Open(partial(_log_metrics, logger), log_samples, lambda: logger.finalize("success"))


def _log_metrics(logger: WandbLogger | MLFlowLogger, step: int, metrics: Mapping[str, float]) -> None:
    logger.log_metrics(dict(metrics), step=step)


def _kept_id(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""
