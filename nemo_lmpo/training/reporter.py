"""What the user sees of a run, on rank 0: banner, progress, metric files, report."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from nemo_lmpo.batch_job import read_batch_job
from nemo_lmpo.recipe import config_as_dict
from nemo_lmpo.training.banner import BannerFacts, detect_kernels, kernels_in_use, package_versions, render_banner
from nemo_lmpo.training.metrics_log import MetricsLog
from nemo_lmpo.training.progress import Progress

if TYPE_CHECKING:
    from nemo_lmpo.training.session import TrainingSession

_logger = logging.getLogger("nemo_lmpo")


class Reporter:
    """Prints the start of a run and passes every line of metrics on."""

    def __init__(self, session: TrainingSession, start_step: int) -> None:
        config = session.config
        self.run = session.run
        self.draw_report = config.logging.report
        job = read_batch_job()
        self._job_metrics = {} if job is None else {"job/restarts": float(job.restarts)}
        self.log = MetricsLog(
            session.run.path,
            config.logging,
            config_for_wandb=config_as_dict(config),
            resume_step=start_step,
            total_steps=session.total_steps,
        )
        _logger.info("%s", render_banner(banner_facts(session, start_step)))
        for data in (session.data.train, session.data.validation):
            if data is not None:
                _logger.info("%s", data.summary)
        _logger.info("%s", session.data.train.example_text())
        self.progress = Progress(config.logging, total_steps=session.total_steps, start_step=start_step)

    def listen(self, step: int, metrics: dict[str, float], prefix: str) -> None:
        """One line of metrics."""
        self.log.log(step, metrics if prefix else {**metrics, **self._job_metrics}, prefix=prefix)
        if prefix:
            self.progress.validation(step, metrics)
        else:
            self.progress.update(step, metrics)

    def close(self) -> None:
        """Close the files and draw the report of what there is."""
        self.progress.close()
        self.log.close()
        if self.draw_report:
            from nemo_lmpo.errors import UserError
            from nemo_lmpo.report.page import write_report

            try:
                _logger.info("report: %s", write_report(self.run.path))
            except (UserError, OSError) as error:
                _logger.info("no report: %s", error)


def banner_facts(session: TrainingSession, start_step: int) -> BannerFacts:
    """Everything the banner shows of a session."""
    config, groups = session.config, session.groups
    cuda = torch.cuda.is_available()
    world_size = torch.distributed.get_world_size()
    if cuda:
        devices = f"{world_size} x {torch.cuda.get_device_name()}"
    else:
        devices = f"CPU, {world_size} process(es) of {torch.get_num_threads()} thread(s)"
    kernels = session.model.kernels
    return BannerFacts(
        recipe=config.name,
        run_dir=str(session.run.path),
        devices=devices,
        world_size=world_size,
        parameters=session.start.architecture.num_parameters(),
        parameters_per_rank=session.model.num_local_parameters(),
        total_steps=session.total_steps,
        global_batch_size=config.model.global_batch_size,
        precision=config.trainer.precision,
        tensor_parallel=groups.tensor.size(),
        pipeline_parallel=groups.pipeline.size(),
        virtual_pipeline_parallel=config.model.virtual_pipeline_model_parallel_size,
        context_parallel=groups.context.size(),
        data_parallel=groups.data.size(),
        sequence_parallel=config.model.sequence_parallel,
        start_step=start_step,
        kernels=kernels_in_use(
            detect_kernels(),
            cuda=cuda,
            transformer_engine=kernels.transformer_engine,
            attention_backend=kernels.attention,
        ),
        versions=package_versions(),
    )
