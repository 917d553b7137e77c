"""The training loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.profiler import record_function

from nemo_lmpo.checkpoint.manager import CheckpointManager
from nemo_lmpo.checkpoint.progress import Progress
from nemo_lmpo.data.order import validation_steps
from nemo_lmpo.errors import TrainingError
from nemo_lmpo.monitor.profile import StepProfiler
from nemo_lmpo.monitor.samples import Sample
from nemo_lmpo.monitor.throughput import peak_memory_gib, throughput_metrics
from nemo_lmpo.monitor.watchdog import watched
from nemo_lmpo.sizing.cards import peak_flops
from nemo_lmpo.sizing.flops import model_flops
from nemo_lmpo.training.ahead import BatchesAhead
from nemo_lmpo.training.batches import StepBatch
from nemo_lmpo.training.example_table import ExampleTable
from nemo_lmpo.training.optimizer import clip_and_step, current_learning_rate, gradient_norm
from nemo_lmpo.training.parts import StepBatches
from nemo_lmpo.training.policy import Policy
from nemo_lmpo.training.samples import AnswerSamples, sample_metrics
from nemo_lmpo.training.saving_costs import SavingCosts
from nemo_lmpo.training.stop import StopCondition

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

_logger = logging.getLogger(__name__)

Listener = Callable[[int, dict[str, float], str], None]
"""Told of every line of metrics: finished steps, metrics, and the prefix (`val/` or nothing)."""


SampleViewer = Callable[[int, Sequence[Sample]], None]
"""Shown the answers of every validation, with the finished steps."""


@dataclass
class FitResult:
    """How a call of :meth:`PreferenceTrainer.fit` ended."""

    step: int
    """Finished optimizer steps of the run."""
    stopped_by: str | None
    """None: all steps are done; else the signal or `time limit`."""
    early: bool = False
    """Whether the run is done before its last step: its patience is over."""


@dataclass
class PreferenceTrainer:
    """Owns the loop; policy, optimizer, data and checkpoints are handed in."""

    policy: Policy
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    steps: StepBatches
    checkpoints: CheckpointManager
    profiler: StepProfiler
    samples: AnswerSamples | None

    def __post_init__(self) -> None:
        self.config = self.policy.config
        self.total_steps = len(self.steps)
        self.validation_examples = self.steps.data.validation
        self.peak_flops = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        self.progress = Progress()
        examples, indices_of = self.steps.data.train, self.steps.sampler.pairs_of_step
        self._ahead = BatchesAhead(self.steps.builder, examples, indices_of, self.total_steps)
        self.saving = SavingCosts()
        self._saved_step = 0
        """Newest step that needs no saving; step 0 is the start weights."""

    def resume(self) -> int:
        """Go on from the newest good checkpoint if there is one; the finished steps."""
        if self.config.checkpoint.resume:
            with self._watched("loading the newest checkpoint"):
                self.progress = self.checkpoints.load_newest()
            if self.progress.step:
                self.scheduler.num_steps = 0
                self.scheduler.step(increment=self.progress.step)
        self._saved_step = self.progress.step
        return self.progress.step

    def fit(
        self, stop: StopCondition, listen: Listener = lambda *_: None, show: SampleViewer = lambda *_: None
    ) -> FitResult:
        """Train until all steps are done or there is a reason to stop, saving on the way.

        Args:
            stop: the reasons.
            listen: hears of every line of metrics.
            show: sees the sampled answers, if there are any.

        Raises:
            TrainingError: a loss or gradient is not finite, or a checkpoint cannot be written.
        """
        stop.longest_save = self.progress.save_seconds
        self.saving.begin()
        if self.progress.step == 0 and self.samples is not None:
            _logger.info("answering %d sampled prompts with the start model", len(self.samples.prompts))
            started = time.monotonic()
            self._sample(show)  # what the answers of later steps are compared with
            stop.longest_validation = max(stop.longest_validation, time.monotonic() - started)
        while self.progress.step < self.total_steps and not self._out_of_patience():
            with self._watched(f"what comes before step {self.progress.step + 1}"):
                reason = stop.reason(self.policy.device, validates=self._validates(self.progress.step + 1))
            if reason is not None:
                self._save_all(stop)
                return FitResult(self.progress.step, reason)
            started = time.monotonic()
            with self._watched(f"step {self.progress.step + 1}"), self.profiler.step(self.progress.step + 1):
                metrics = self.train_step(self.progress.step)
            stop.longest_step = max(stop.longest_step, time.monotonic() - started)
            self.progress.step += 1
            self.progress.metrics.update(metrics)
            listen(self.progress.step, metrics | self.saving.take_metrics(), "")
            self._after_step(stop, listen, show)
            with self._watched(f"publishing a checkpoint after step {self.progress.step}"):
                self.checkpoints.poll()
            self._count_saving(stop)
        self._save_all(stop)
        return FitResult(self.progress.step, None, early=self.progress.step < self.total_steps)

    def _out_of_patience(self) -> bool:
        """Whether too many validations brought nothing better; the same on every rank, as their metrics are."""
        patience = self.config.trainer.early_stopping_patience
        return patience > 0 and self.progress.without_better >= patience

    def early_stop_facts(self) -> dict[str, Any]:
        """Why the run is done before its last step, for the report."""
        return {
            "step": self.progress.step,
            "monitor": self.config.checkpoint.monitor,
            "best": self.progress.best,
            "without_better": self.progress.without_better,
        }

    def _count_validation(self) -> None:
        """Note whether this validation is the best so far."""
        value, best = self.progress.metrics.get(self.config.checkpoint.monitor), self.progress.best
        sign = 1 if self.config.checkpoint.mode == "min" else -1
        better = value is not None and math.isfinite(value) and (best is None or sign * value < sign * best)
        self.progress.best = value if better else best
        self.progress.without_better = 0 if better else self.progress.without_better + 1

    def _watched(self, what: str) -> AbstractContextManager[None]:
        return watched(what, self.config.trainer.step_timeout)

    def _after_step(self, stop: StopCondition, listen: Listener, show: SampleViewer) -> None:
        """Validate and save where it is time."""
        step = self.progress.step
        checkpoint = self.config.checkpoint
        last = step == self.total_steps
        validated = self._validates(step)
        if validated and self.validation_examples is not None:
            started = time.monotonic()
            metrics = self.validate() | self._sample(show)
            stop.longest_validation = max(stop.longest_validation, time.monotonic() - started)
            self.progress.metrics.update({f"val/{name}": value for name, value in metrics.items()})
            self._count_validation()
            listen(step, metrics, "val/")
        due = checkpoint.save_interval > 0 and step % checkpoint.save_interval == 0
        if due or last or (validated and checkpoint.keep_best > 0):
            self._save_if_new(stop)

    def _sample(self, show: SampleViewer) -> dict[str, float]:
        """Answer the sampled prompts, and show the answers; their metrics, none where nothing is sampled."""
        if self.samples is None:
            return {}
        taken = self.samples.take()
        show(self.progress.step, taken)
        return sample_metrics(taken)

    def _validates(self, step: int) -> bool:
        """Whether a validation belongs after ``step`` finished steps."""
        interval = self.config.trainer.val_check_interval
        return step == self.total_steps or (interval > 0 and step % interval == 0)

    def _save_all(self, stop: StopCondition) -> None:
        """Save, and wait until everything is written."""
        self._save_if_new(stop)
        with self._watched(f"writing the checkpoint of step {self.progress.step}"):
            self.checkpoints.wait()
        self._count_saving(stop)

    def _save_if_new(self, stop: StopCondition) -> None:
        """Save unless this step is saved already."""
        if self.progress.step == self._saved_step:
            return
        self._ahead.wait()  # writers are forked off
        statistics = self.policy.statistics
        self.progress.statistics = statistics.state_dict() if statistics is not None else None
        snapshot = Progress(**{**vars(self.progress), "metrics": dict(self.progress.metrics)})
        with self._watched(f"saving step {self.progress.step}"):
            self.checkpoints.save(snapshot)
        self._saved_step = self.progress.step
        self._count_saving(stop)

    def _count_saving(self, stop: StopCondition) -> None:
        """Note what saving took since this was last called, and keep as much free before a time limit."""
        longest = self.saving.count(self.checkpoints)
        self.progress.save_seconds = max(self.progress.save_seconds, longest)
        stop.longest_save = max(stop.longest_save, longest)

    def train_step(self, step: int) -> dict[str, float]:
        """Run optimizer step ``step`` (from 0) and return its metrics."""
        started = time.monotonic()
        batch = self._ahead.get(step)
        self.policy.prepare_for_training_step()
        # Without main parameters the optimizer leaves the buffer's gradients on the parameters, where backward
        # would add to them a second time.
        self.optimizer.zero_grad()
        with record_function("forward and backward"):
            outcome = self.policy.get_loss_and_metrics(batch, forward_only=False)
        self._refuse_not_finite_losses(batch, outcome.not_finite, step)
        self.policy.finish_training_step()
        norm = gradient_norm(self.optimizer)
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient norm of step {step + 1} is {norm}; its {batch.kind}: {_shorten(batch.example_ids)}; "
                f"lower optim.lr={self.config.optim.lr} or look at these {batch.kind}"
            )
        metrics = {**outcome.metrics, "grad_norm": norm}
        metrics["lr"] = current_learning_rate(self.optimizer)
        with record_function("optimizer"):
            clip_and_step(self.optimizer, norm, self.config.trainer.gradient_clip_val)
        self.scheduler.step(increment=1)
        if self.policy.device.type == "cuda":
            # The next thing that happens is a read of the stop flag; until here the time would miss the optimizer.
            torch.cuda.synchronize()
        metrics.update(self._throughput(batch, time.monotonic() - started))
        return metrics

    def _refuse_not_finite_losses(self, batch: StepBatch, bad: list[int], step: int) -> None:
        if bad:
            raise TrainingError(
                f"the loss of step {step + 1} is not finite for {len(bad)} of {batch.num_examples} {batch.kind}: "
                f"{_shorten([batch.example_ids[position] for position in bad])}; remove them or lower "
                f"optim.lr={self.config.optim.lr}"
            )

    def _throughput(self, batch: StepBatch, seconds: float) -> dict[str, float]:
        flops = model_flops(
            self.policy.architecture,
            tokens=batch.tokens,
            predicted_tokens=batch.predicted,
            attended=batch.attended,
        )
        return {
            "epoch": (self.progress.step + 1) / self.steps.sampler.steps_per_epoch,
            "step_seconds": seconds,
            "data/imbalance": batch.imbalance,
            "memory/peak": peak_memory_gib(),
            **throughput_metrics(
                examples=batch.num_examples,
                kind=batch.kind,
                tokens=batch.tokens,
                seconds=seconds,
                flops=flops,
                devices=torch.distributed.get_world_size(),
                device_peak_flops=self.peak_flops,
            ),
        }

    def validate(self) -> dict[str, float]:
        """Metrics over all validation examples, under names without prefix."""
        assert self.validation_examples is not None
        parts: list[ExampleTable] = []
        steps = validation_steps(len(self.validation_examples), self.config.model.global_batch_size)
        batches = BatchesAhead(self.steps.builder, self.validation_examples, steps.__getitem__, len(steps))
        with closing(batches):
            for number in range(len(steps)):
                of = f"batch {number + 1} of {len(steps)} of the validation after step {self.progress.step}"
                with self._watched(of):
                    parts.append(self.policy.run_batch(batches.get(number), forward_only=True))
        joined, examples = ExampleTable.join(parts), self.validation_examples
        return joined.metrics() | joined.by_source(examples.sources(np.arange(len(examples))), examples.source_names)


def _shorten(names: list[Any], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(str(name) for name in names[:most]) + more
