"""Where metrics go besides `metrics.jsonl`: TensorBoard, Weights & Biases and MLflow, through Lightning's loggers."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_lmpo.config.schema import LoggingConfig, MlflowConfig, WandbConfig
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.monitor.samples import Sample, as_markdown
from nemo_lmpo.runtime import run_files
from nemo_lmpo.runtime.atomic import replace_file

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

MLFLOW_ID_FILE = "mlflow_id"
_COLUMNS = tuple(field.name for field in fields(Sample))


@dataclass(frozen=True)
class _Tracker:
    """One that is open."""

    logger: Logger
    log_samples: Callable[[int, Sequence[Sample]], object]
    """How answers are shown there, by step."""
    finish: Callable[[], object]


class Trackers:
    """The trackers that a run asks for; to be made on global rank 0 only."""

    def __init__(self, run_dir: Path, config: LoggingConfig, *, settings: Mapping[str, Any], resume_step: int) -> None:
        """Start them, or go on with the runs whose ids are kept in the run directory.

        Args:
            run_dir: the run's directory, made if missing once all packages are there.
            config: which trackers.
            settings: the resolved configuration, which W&B and MLflow show.
            resume_step: finished steps of the checkpoint that is resumed; 0 for a new run.

        Raises:
            ConfigError: one is configured, but missing or unable to start.
        """
        openers: list[Callable[[], _Tracker]] = []
        if config.wandb.project:
            _require("wandb", f"logging.wandb.project={config.wandb.project!r}")
            openers.append(lambda: _wandb(run_dir, config.wandb, settings))
        if config.mlflow.experiment:
            _require("mlflow", f"logging.mlflow.experiment={config.mlflow.experiment!r}")
            openers.append(lambda: _mlflow(run_dir, config.mlflow, settings))
        if config.tensorboard:
            openers.append(lambda: _tensorboard(run_dir, resume_step))
        run_dir.mkdir(parents=True, exist_ok=True)
        self._open = [opener() for opener in openers]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line; steps that a tracker saw before an interruption are repeated exactly."""
        for tracker in self._open:
            tracker.logger.log_metrics(dict(metrics), step=step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """The answers of a validation; as :meth:`log`, repeated ones take the place of those before."""
        for tracker in self._open:
            tracker.log_samples(step, samples)

    def close(self) -> None:
        """Finish all of them; can be called twice."""
        while self._open:
            self._open.pop().finish()


def _require(package: str, setting: str) -> None:
    try:
        __import__(package)
    except ImportError:
        raise ConfigError(
            f"{setting} needs the package {package}; run `pip install 'nemo-lmpo[{package}]'` or unset it"
        ) from None


def _tensorboard(run_dir: Path, resume_step: int) -> _Tracker:
    from lightning.pytorch.loggers import TensorBoardLogger

    # TensorBoard hides what earlier files have of this step and later ones.
    logger = TensorBoardLogger(
        run_dir, name=run_files.TENSORBOARD, version="", default_hp_metric=False, purge_step=resume_step + 1
    )
    logger.experiment  # noqa: B018  # opens the file, which hides the steps even if none follows

    def log_samples(step: int, samples: Sequence[Sample]) -> None:
        for index, sample in enumerate(samples):
            logger.experiment.add_text(f"val/samples/{index}", as_markdown(sample), step)

    return _Tracker(logger, log_samples, lambda: logger.finalize(""))


def _wandb(run_dir: Path, config: WandbConfig, settings: Mapping[str, Any]) -> _Tracker:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    run_id = _kept_id(run_dir / run_files.WANDB_ID) or secrets.token_hex(4)
    replace_file(run_dir / run_files.WANDB_ID, f"{run_id}\n")
    logger: WandbLogger = WandbLogger(
        project=config.project,
        name=config.name or run_dir.name,
        entity=config.entity,
        save_dir=run_dir,
        id=run_id,
        config=dict(settings),
    )
    try:
        logger.experiment  # noqa: B018  # starts the run
    except (wandb.errors.Error, OSError) as error:
        raise ConfigError(
            f"logging.wandb.project={config.project!r}: W&B cannot start ({error}); run `wandb login`, "
            "set WANDB_MODE=offline, or unset logging.wandb.project"
        ) from error

    def log_samples(step: int, samples: Sequence[Sample]) -> None:
        rows = [[step, *asdict(sample).values()] for sample in samples]
        logger.log_text("val/samples", columns=["step", *_COLUMNS], data=rows, step=step)

    return _Tracker(logger, log_samples, logger.experiment.finish)


def _mlflow(run_dir: Path, config: MlflowConfig, settings: Mapping[str, Any]) -> _Tracker:
    from lightning.pytorch.loggers import MLFlowLogger
    from mlflow.exceptions import MlflowException

    uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    setting = f"logging.mlflow.experiment={config.experiment!r}"
    if not uri:
        raise ConfigError(f"{setting} needs a server; set logging.mlflow.tracking_uri or MLFLOW_TRACKING_URI")
    kept = _kept_id(run_dir / MLFLOW_ID_FILE)
    try:
        logger: MLFlowLogger = MLFlowLogger(
            experiment_name=str(config.experiment),
            run_name=config.name or run_dir.name,
            tracking_uri=uri,
            run_id=kept or None,
        )
        if not kept:
            logger.log_hyperparams(dict(settings))
    except (MlflowException, OSError) as error:
        raise ConfigError(
            f"{setting}: MLflow cannot start at {uri} ({error}); correct logging.mlflow.tracking_uri, or unset "
            "logging.mlflow.experiment"
        ) from error
    replace_file(run_dir / MLFLOW_ID_FILE, f"{logger.run_id}\n")

    def log_samples(step: int, samples: Sequence[Sample]) -> None:
        # A file a step: MLflow's tables only grow, and a resumed run would repeat its lines in one.
        table = [asdict(sample) for sample in samples]
        logger.experiment.log_dict(logger.run_id, {"step": step, "samples": table}, f"samples/step_{step:07d}.json")

    return _Tracker(logger, log_samples, lambda: logger.finalize("success"))


def _kept_id(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""
