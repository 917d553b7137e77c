"""What the user sees of a run, on rank 0: banner, console, metric files, report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from nemo_lmpo.config.recipe import config_as_dict
from nemo_lmpo.config.schema import Config
from nemo_lmpo.errors import Lines, UserError
from nemo_lmpo.monitor.banner import BannerFacts, render_banner
from nemo_lmpo.monitor.console import Console
from nemo_lmpo.monitor.metrics_log import MetricsLog
from nemo_lmpo.monitor.observer import Harmless
from nemo_lmpo.runtime.batch_job import BatchJob

_logger = logging.getLogger("nemo_lmpo")


class Reporter:
    """Prints the start of a run and passes every line of metrics on."""

    def __init__(
        self, run_dir: Path, config: Config, facts: BannerFacts, summaries: Sequence[str], job: BatchJob | None
    ) -> None:
        """Open the files and show the start.

        Args:
            run_dir: where metrics and report go.
            config: what is kept of it with the metrics, and how much is shown.
            facts: the banner's content.
            summaries: texts shown below the banner, of the data above all.
            job: the batch job that the run belongs to.
        """
        self.run_dir = run_dir
        self.draw_report = config.logging.report
        self._job_metrics = {} if job is None else {"job/restarts": float(job.restarts)}
        self.log = MetricsLog(
            run_dir,
            config.logging,
            settings=config_as_dict(config),
            resume_step=facts.start_step,
            total_steps=facts.total_steps,
        )
        for text in (render_banner(facts), *summaries):
            _logger.info("%s", Lines(text))
        self.console = Console(config.logging, total_steps=facts.total_steps, start_step=facts.start_step)
        self._showing = Harmless("the display of progress", instead="metrics.jsonl has every step")

    def listen(self, step: int, metrics: dict[str, float], prefix: str) -> None:
        """One line of metrics.

        Raises:
            TrainingError: `metrics.jsonl` cannot be written.
        """
        self.log.log(step, metrics if prefix else {**metrics, **self._job_metrics}, prefix=prefix)
        with self._showing:
            if prefix:
                self.console.validation(step, metrics)
            else:
                self.console.update(step, metrics)

    def close(self) -> None:
        """Close the files and draw the report of what there is.

        Raises:
            TrainingError: the last lines of `metrics.jsonl` cannot be written.
        """
        with self._showing:
            self.console.close()
        try:
            self.log.close()
        finally:
            if self.draw_report:
                self._draw_report()

    def _draw_report(self) -> None:
        remedy = f"`python -m nemo_lmpo.report {self.run_dir}` draws it again"
        with Harmless("the report", instead=remedy):
            from nemo_lmpo.report.page import write_report

            try:
                _logger.info("report: %s", write_report(self.run_dir))
            except UserError as error:  # no step is finished
                _logger.info("no report: %s", error)
