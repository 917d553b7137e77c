"""Builds everything a run needs, trains, and cleans up: what `nemo_lmpo.train` calls after validation."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nemo_lmpo.checkpoint.export import sharded_weights
from nemo_lmpo.checkpoint.manager import CheckpointManager, TrainState
from nemo_lmpo.checkpoint.optimizer_state import load_optimizer_state, optimizer_sharded_state
from nemo_lmpo.checkpoint.random_state import restore_random_state, seed_everything, sharded_random_state
from nemo_lmpo.checkpoint.run_directory import RunDirectory
from nemo_lmpo.config.duration import parse_duration
from nemo_lmpo.config.schema import Config
from nemo_lmpo.data.order import PairSampler
from nemo_lmpo.data.preference import PreferenceDataset, load_preference_dataset
from nemo_lmpo.data.tokenizer import check_vocabulary, load_tokenizer, padding_id
from nemo_lmpo.formats.base_model import BaseModel
from nemo_lmpo.formats.load import load_model_weights
from nemo_lmpo.formats.model_files import open_model
from nemo_lmpo.formats.source import TensorSource, random_source
from nemo_lmpo.monitor.banner import BannerFacts, detect_kernels, kernels_in_use, package_versions
from nemo_lmpo.monitor.reporter import Reporter
from nemo_lmpo.monitor.throughput import peak_flops
from nemo_lmpo.parallel.groups import ParallelGroups, create_groups, destroy_groups, start_process_group
from nemo_lmpo.runtime.batch_job import read_batch_job
from nemo_lmpo.runtime.cpu_adapter import ADAPTER
from nemo_lmpo.runtime.cpu_memory import keep_freed_memory
from nemo_lmpo.runtime.launch import LaunchInfo
from nemo_lmpo.training.batches import BatchBuilder
from nemo_lmpo.training.nemo_plugin import MegatronGPTLMPOModel, nemo_config
from nemo_lmpo.training.optimizer import build_optimizer, build_scheduler
from nemo_lmpo.training.reference import FrozenReference, ReferenceLogps
from nemo_lmpo.training.stop import StopCondition
from nemo_lmpo.training.trainer import FitResult, PreferenceTrainer

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from transformers import PreTrainedTokenizerBase

    from nemo_lmpo.model.packed_gpt import PackedGPTModel

_logger = logging.getLogger(__name__)


@contextmanager
def distributed_session(config: Config, launch: LaunchInfo) -> Iterator[tuple[ParallelGroups, torch.device]]:
    """Process groups and the device for a block; on machines without GPUs through the CPU adapter."""
    use_cuda = torch.cuda.is_available()
    if use_cuda:
        device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
    else:
        device = torch.device("cpu")
        ADAPTER.install()
        keep_freed_memory()
        torch.set_num_threads(threads_per_process(config, launch))
    start_process_group(launch, use_cuda=use_cuda)
    try:
        yield create_groups(config.model), device
    finally:
        destroy_groups()
        if not use_cuda:
            ADAPTER.uninstall()


def threads_per_process(config: Config, launch: LaunchInfo) -> int:
    """CPU threads for this process: as configured, else the node's cores shared equally."""
    if config.trainer.num_threads is not None:
        return config.trainer.num_threads
    return max(1, len(os.sched_getaffinity(0)) // launch.local_world_size)


@dataclass
class LoadedData:
    """Tokenizer and tokenized pairs."""

    tokenizer: PreTrainedTokenizerBase
    train: PreferenceDataset
    validation: PreferenceDataset | None


def load_data(config: Config, start: BaseModel) -> LoadedData:
    """Tokenize (or read from the cache) what the run trains and validates on."""
    tokenizer = load_tokenizer(start.tokenizer, trust_remote_code=config.model.trust_remote_code)
    check_vocabulary(tokenizer, start.architecture.vocab_size)
    train = load_preference_dataset(config.data, config.data.train, tokenizer, name="train")
    validation = None
    if config.data.validation.path is not None:
        validation = load_preference_dataset(config.data, config.data.validation, tokenizer, name="validation")
    return LoadedData(tokenizer, train, validation)


def load_start_weights(chunks: list[PackedGPTModel], groups: ParallelGroups, start: BaseModel, seed: int) -> None:
    """Fill a model with the start's weights; each rank reads its own part."""
    if start.path is not None:
        source: TensorSource = open_model(start.path).source
    else:
        source = random_source(start.architecture, seed)
    load_model_weights(
        list(chunks), source, start.architecture, tp_rank=groups.tensor.rank(), tp_size=groups.tensor.size()
    )


def total_steps(config: Config, sampler: PairSampler) -> int:
    """Optimizer steps of the whole run."""
    return config.trainer.max_steps or config.trainer.max_epochs * sampler.steps_per_epoch


class TrainingSession:
    """One process's share of a run."""

    def __init__(
        self,
        config: Config,
        start: BaseModel,
        run: RunDirectory,
        launch: LaunchInfo,
        groups: ParallelGroups,
        device: torch.device,
    ) -> None:
        self.config = config
        self.start = start
        self.run = run
        self.launch = launch
        self.groups = groups
        seed_everything(config.model.seed)
        self.data = load_data(config, start)
        self.sampler = PairSampler(len(self.data.train), config.model.global_batch_size, config.model.seed)
        self.total_steps = total_steps(config, self.sampler)
        self.model = MegatronGPTLMPOModel(
            nemo_config(config), config=config, architecture=start.architecture, groups=groups, device=device
        )
        self.model.write_sidecars = lambda directory: run.write_sidecars(directory, start, self.data.tokenizer)
        load_start_weights(self.model.policy, groups, start, config.model.seed)
        self.optimizer: MegatronOptimizer = build_optimizer(
            list(self.model.chunks), config.optim, config.trainer, self.model.dtype_of_parameters
        )
        self.batches = BatchBuilder(
            config,
            groups,
            device=device,
            pad_id=padding_id(self.data.tokenizer),
            sliding_window=start.architecture.sliding_window,
        )
        if self.model.loss.needs_reference:
            self._prepare_reference()
        self.checkpoints = self._checkpoints()

    def _prepare_reference(self) -> None:
        """A frozen second model, or log-probabilities of all pairs; the policy still has the start weights."""
        if self.config.model.reference_in_memory:
            self.model.reference = FrozenReference(
                self.model,
                lambda chunks: load_start_weights(chunks, self.groups, self.start, self.config.model.seed),
            )
            return
        reference = ReferenceLogps(self.config, self.start, self.data.tokenizer, self.model, self.batches)
        reference.attach(self.data.train, "train")
        if self.data.validation is not None:
            reference.attach(self.data.validation, "validation")

    def _checkpoints(self) -> CheckpointManager:
        bytes_a_parameter = 2 + 12 if self.config.trainer.precision == "bf16" else 12
        return CheckpointManager(
            self.run.checkpoints,
            self.config.checkpoint,
            make_state=self.sharded_state,
            load_state=self.load_sharded_state,
            write_sidecars=self.model.write_sidecars,
            state_bytes=bytes_a_parameter * self.start.architecture.num_parameters(),
            layout=self.layout(),
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

    def sharded_state(self, is_loading: bool) -> dict[str, Any]:
        """Weights, optimizer and random states as megatron-core's sharded state dict."""
        state = sharded_weights(self.model.policy)
        state["optimizer"] = optimizer_sharded_state(self.optimizer, dict(state), is_loading=is_loading)
        if not is_loading or self._same_layout():
            state["random_state"] = sharded_random_state()
        return state

    def _same_layout(self) -> bool:
        return self.checkpoints.loading is not None and self.checkpoints.loading.layout == self.layout()

    def load_sharded_state(self, state: dict[str, Any], progress: TrainState) -> None:
        """Put a loaded state back into model, optimizer, generators and margin statistics."""
        for index, chunk in enumerate(self.model.policy):
            chunk.load_state_dict(
                {name.removeprefix("model."): tensor for name, tensor in state[f"model{index}"].items()}
            )
        load_optimizer_state(self.optimizer, state["optimizer"], step=progress.step)
        if "random_state" in state:
            restore_random_state(state["random_state"])
        if self.model.statistics is not None and progress.statistics is not None:
            self.model.statistics.load_state_dict(progress.statistics)

    def trainer(self) -> PreferenceTrainer:
        """The loop over this session's model and data, at step 0."""
        return PreferenceTrainer(
            self.config,
            self.model,
            self.optimizer,
            build_scheduler(self.optimizer, self.config.optim, self.total_steps),
            train_pairs=self.data.train,
            validation_pairs=self.data.validation,
            sampler=self.sampler,
            batches=self.batches,
            checkpoints=self.checkpoints,
            total_steps=self.total_steps,
            peak_flops=peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None,
        )

    def _reporter(self, start_step: int) -> Reporter:
        data = [data.summary for data in (self.data.train, self.data.validation) if data is not None]
        return Reporter(
            self.run.path,
            self.config,
            self.banner_facts(start_step),
            [*map(str, data), self.data.train.example_text()],
            total_steps=self.total_steps,
            start_step=start_step,
        )

    def banner_facts(self, start_step: int) -> BannerFacts:
        """Everything the banner shows."""
        config, groups, kernels = self.config, self.groups, self.model.kernels
        cuda, world_size = torch.cuda.is_available(), dist.get_world_size()
        if cuda:
            devices = f"{world_size} x {torch.cuda.get_device_name()}"
        else:
            devices = f"CPU, {world_size} process(es) of {torch.get_num_threads()} thread(s)"
        return BannerFacts(
            recipe=config.name,
            run_dir=str(self.run.path),
            devices=devices,
            world_size=world_size,
            parameters=self.start.architecture.num_parameters(),
            parameters_per_rank=self.model.num_local_parameters(),
            total_steps=self.total_steps,
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

    def train(self, started: float) -> FitResult:
        """Resume, train, report; ``started`` is when the process began, which time limits count from."""
        trainer = self.trainer()
        self.checkpoints.clean()
        start_step = trainer.resume()
        reporter = self._reporter(start_step) if self.launch.is_main else None
        if reporter is not None:
            trainer.listener = reporter.listen
        limit = parse_duration(self.config.trainer.max_time_per_run)
        job = read_batch_job()
        try:
            with StopCondition(limit, started=started, stop_at=job.stop_at if job else None) as stop:
                return trainer.fit(stop)
        finally:
            if reporter is not None:
                reporter.close()


def run_training(config: Config, start: BaseModel, run: RunDirectory, launch: LaunchInfo, started: float) -> FitResult:
    """Train in this process from start to end (or to the first reason to stop)."""
    with distributed_session(config, launch) as (groups, device):
        session = TrainingSession(config, start, run, launch, groups, device)
        result = session.train(started)
        dist.barrier()
    return result
