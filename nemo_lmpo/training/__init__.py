"""The step: policy, pipeline, batches, optimizer, and the loop around them.

:func:`run` is the one way to train; the command, comparisons, benchmarks and tests use it.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_lmpo.config.schema import Config
    from nemo_lmpo.runtime.launch import LaunchInfo
    from nemo_lmpo.training.trainer import FitResult

_logger = logging.getLogger(__name__)


def run(config: Config, launch: LaunchInfo, *, started: float | None = None) -> FitResult:
    """Train in this process from start to end, or to the first reason to stop.

    Communicates over all processes of ``launch``.

    Args:
        config: a checked configuration (:func:`nemo_lmpo.config.recipe.load_recipe`).
        launch: this process's place in the job.
        started: when the process began (`time.time()`), which time limits count from; unset: now.

    Raises:
        UserError: settings, start model, data or run directory cannot be used; nothing was trained.
        TrainingError: the run had to end; checkpoints are as they were saved.
    """
    from nemo_lmpo.training.preflight import preflight

    _logger.info("checking settings, model and data")
    checked = preflight(config, launch.world_size, fetch=True)
    _logger.info("loading torch and megatron-core")
    from nemo_lmpo.monitor.watchdog import watched
    from nemo_lmpo.parallel.groups import wait_for_all
    from nemo_lmpo.runtime.environment import leave_out_compiler, uses_gpu
    from nemo_lmpo.runtime.transformer_engine import leave_out_transformer_engine

    if not uses_gpu(config.trainer.accelerator, launch):
        # Before anything imports megatron-core.
        leave_out_transformer_engine()
        leave_out_compiler()
    from nemo_lmpo.training.session import open_session

    with open_session(config, launch, checked) as session:
        result = session.train(time.time() if started is None else started)
        with watched("waiting for the other ranks at the end", config.trainer.step_timeout):
            wait_for_all(session.device)
    return result
