"""One process's share of a run: everything that it needs, built in order, and what is saved of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from nemo_lmpo.checkpoint.agreement import on_main_rank
from nemo_lmpo.checkpoint.background import saves_in_background
from nemo_lmpo.checkpoint.manager import CheckpointManager
from nemo_lmpo.checkpoint.optimizer_state import load_optimizer_state, optimizer_sharded_state
from nemo_lmpo.checkpoint.progress import Progress, find_missing_statistics
from nemo_lmpo.checkpoint.random_state import restore_random_state, seed_everything
from nemo_lmpo.checkpoint.run_directory import RunDirectory
from nemo_lmpo.checkpoint.same_run import refuse_changed_data, refuse_other_data_on_other_ranks
from nemo_lmpo.checkpoint.weights import describe_weights, load_weights, sharded_weights
from nemo_lmpo.config.rules import ParallelLayout
from nemo_lmpo.config.rules.settings import parse_duration
from nemo_lmpo.config.schema import Config
from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.formats.start_model import StartModel
from nemo_lmpo.model.comm_overlap import communication_buffers
from nemo_lmpo.monitor.profile import StepProfiler
from nemo_lmpo.monitor.reporter import Reporter
from nemo_lmpo.monitor.watchdog import reporting_hangs_in, watched
from nemo_lmpo.parallel.groups import ParallelGroups
from nemo_lmpo.runtime import run_files
from nemo_lmpo.runtime.batch_job import BatchJob, expired_end, read_batch_job
from nemo_lmpo.runtime.environment import uses_gpu
from nemo_lmpo.runtime.flight_recorder import record_collectives
from nemo_lmpo.runtime.launch import LaunchInfo
from nemo_lmpo.sizing.memory import moment_bytes
from nemo_lmpo.sizing.row_length import longest_row
from nemo_lmpo.training.facts import banner_facts
from nemo_lmpo.training.optimizer import build_optimizer, build_scheduler
from nemo_lmpo.training.parts import PolicyFiles, StepBatches, start_policy
from nemo_lmpo.training.policy import kernels_for
from nemo_lmpo.training.preflight import Preflight, preflight
from nemo_lmpo.training.process import distributed_session
from nemo_lmpo.training.samples import answer_samples
from nemo_lmpo.training.start import load_data
from nemo_lmpo.training.stop import StopCondition
from nemo_lmpo.training.trainer import FitResult, PreferenceTrainer

_logger = logging.getLogger("nemo_lmpo")


@dataclass
class TrainingSession:
    """Data, policy, optimizer and checkpoints of this process."""

    config: Config
    base: StartModel
    run: RunDirectory
    launch: LaunchInfo
    groups: ParallelGroups
    device: torch.device
    job: BatchJob | None = None
    """The batch job that this process belongs to."""

    def __post_init__(self) -> None:
        seed_everything(self.config.model.seed)
        self.data = load_data(self.config, self.base, self.run)
        self.fingerprints = self.data.fingerprints()
        refuse_other_data_on_other_ranks(self.config, self.fingerprints)
        self.policy = start_policy(self.config, self.base, self.groups, self.device)
        with watched("building the optimizer", self.config.trainer.step_timeout):
            self.optimizer = build_optimizer(self.policy.chunks, self.config)
        self.steps = StepBatches(self.policy, self.base, self.data)
        self.files = PolicyFiles(self.policy, self.base, self.run, self.data.tokenizer, self.data.chat)
        self.checkpoints = self._checkpoints()

    def _checkpoints(self) -> CheckpointManager:
        weights = 2 + 4 if self.config.trainer.precision == "bf16" else 4
        return CheckpointManager(
            self.run.checkpoints,
            self.config.checkpoint,
            make_state=self.sharded_state,
            load_state=self.load_sharded_state,
            write_sidecars=self.files.write_sidecars,
            state_bytes=round((weights + moment_bytes(self.config)) * self.base.architecture.num_parameters()),
            layout=self.layout(),
            find_missing=self.find_missing,
            data=self.fingerprints,
            base=self.files.adapters.fingerprint if self.files.adapters else "",
            in_background=saves_in_background(
                ParallelLayout(self.config, self.base.architecture, torch.distributed.get_world_size()), self.device
            ),
        )

    def layout(self) -> dict[str, int]:
        """Sizes of the parallel groups, as saved with checkpoints."""
        return {
            "tensor": self.groups.tensor.size(),
            "pipeline": self.groups.pipeline.size(),
            "context": self.groups.context.size(),
            "data": self.groups.data.size(),
            "virtual_pipeline": self.config.model.virtual_pipeline_model_parallel_size or 1,
        }

    def sharded_state(self, progress: Progress | None) -> dict[str, Any]:
        """Weights and optimizer as megatron-core's sharded state dict; ``progress`` is None for saving."""
        description = describe_weights(self.policy.models if progress is not None else self.policy.whole_models())
        state = sharded_weights(description)
        state["optimizer"] = optimizer_sharded_state(self.optimizer, description, is_loading=progress is not None)
        return state

    def find_missing(self, progress: Progress) -> str | None:
        """What a checkpoint lacks for this run to go on from it; before anything of it is loaded.

        Raises:
            DataError: the checkpoint is of other pairs.
            CheckpointError: its margin statistics are of another kind.
        """
        if progress.base != (self.files.adapters.fingerprint if self.files.adapters else ""):
            raise CheckpointError(
                f"the checkpoints in {self.run.checkpoints} hold adapters of another base than "
                f"model.restore_from_path={self.config.model.restore_from_path} (hash {progress.base[:16]}... there); "
                f"give the base that they were trained on, or another run_dir"
            )
        self.run.changes.update(refuse_changed_data(self.config, progress.data, self.fingerprints))
        return find_missing_statistics(self.policy.statistics, progress)

    def load_sharded_state(self, state: dict[str, Any], progress: Progress) -> None:
        """Put a loaded state back into model, optimizer, generators and margin statistics."""
        load_weights(self.policy.models, state)
        load_optimizer_state(self.optimizer, state["optimizer"], step=progress.step)
        if "random_state" in state:
            restore_random_state(state["random_state"])
        if self.policy.statistics is not None and progress.statistics is not None:
            self.policy.statistics.load_state_dict(progress.statistics)

    def trainer(self) -> PreferenceTrainer:
        """The loop over this session's policy and data, at step 0."""
        return PreferenceTrainer(
            self.policy,
            self.optimizer,
            build_scheduler(self.optimizer, self.config.optim, len(self.steps)),
            self.steps,
            self.checkpoints,
            StepProfiler(self.config.trainer.profile, self.run.path / "profile", rank=self.launch.rank),
            answer_samples(self.policy, self.base, self.steps),
        )

    def _reporter(self, start_step: int) -> Reporter:
        data = [data.summary for data in (self.data.train, self.data.validation) if data is not None]
        return Reporter(
            self.run.path,
            self.config,
            banner_facts(
                self.policy,
                self.run.path,
                total_steps=len(self.steps),
                start_step=start_step,
                examples=self.data.train.summary.kind,
            ),
            [*map(str, data), self.data.train.example_text()],
            self.job,
        )

    def train(self, started: float) -> FitResult:
        """Resume, train, report; ``started`` is when the process began, which time limits count from."""
        trainer = self.trainer()
        self.checkpoints.clean()
        start_step = trainer.resume()
        with watched("beginning the run", self.config.trainer.step_timeout):
            on_main_rank(lambda: self.run.begin(start_step, self.data.chat))
        reporter = self._reporter(start_step) if self.launch.is_main else None
        limit = parse_duration(self.config.trainer.max_time_per_run)
        job = self.job
        if self.launch.is_main and (expired := expired_end()) is not None:
            _logger.warning("%s is in the past and is ignored: this run knows no time limit of its job", expired)
        try:
            with StopCondition(limit, started=started, stop_at=job.stop_at if job else None) as stop:
                if reporter is None:
                    return trainer.fit(stop)
                result = trainer.fit(stop, reporter.listen, reporter.log.log_samples)
                reporter.log.note_saving(trainer.saving.facts())
                if result.early:
                    reporter.log.note_early_stop(trainer.early_stop_facts())
                return result
        finally:
            trainer.profiler.close()
            if reporter is not None:
                reporter.close()


@contextmanager
def open_session(config: Config, launch: LaunchInfo, checked: Preflight | None = None) -> Iterator[TrainingSession]:
    """Check everything that can be checked early, take the run directory, join the job, and build the session.

    Communicates: joins the process group, and leaves it at the end of the block.

    Args:
        config: a configuration of :func:`nemo_lmpo.config.recipe.load_recipe`.
        launch: this process's place in the job.
        checked: what :func:`nemo_lmpo.training.preflight.preflight` found; unset: it is asked here.

    Raises:
        UserError: as :func:`~nemo_lmpo.training.preflight.preflight`, and what does not fit this machine.
    """
    checked = checked or preflight(config, launch.world_size, fetch=True)
    base, run = checked.base, checked.run or RunDirectory(config)
    use_cuda = uses_gpu(config.trainer.accelerator, launch)
    kernels_for(config, base.architecture, use_cuda=use_cuda)  # refused before data is read
    job = read_batch_job()
    hang = run.path / run_files.HANG
    if launch.world_size > 1:
        limits = config.trainer
        record_collectives(hang, step_timeout=limits.step_timeout, collective_timeout=60 * limits.distributed_timeout)
    with reporting_hangs_in(hang), run.taken() if launch.is_main else nullcontext():
        if launch.is_main and job is not None:
            job.record(run.path)
        if launch.is_main and use_cuda and launch.world_size > 1:
            hang.mkdir(exist_ok=True)  # NCCL's own watchdog makes no directory
        with (
            distributed_session(config, launch) as (groups, device),
            communication_buffers(
                config.model,
                groups,
                row_tokens=longest_row(config, gpu=device.type == "cuda"),
                hidden_size=base.architecture.hidden_size,
            ),
        ):
            yield TrainingSession(config, base, run, launch, groups, device, job)
