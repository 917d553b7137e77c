"""The policy: model chunks, loss and running statistics of one process, and what a step does with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch

from nemo_lmpo.config.schema import Config
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.formats.architecture import Architecture
from nemo_lmpo.loss.interface import Statistics
from nemo_lmpo.loss.registry import build_loss
from nemo_lmpo.loss.running_statistics import RunningStatistics
from nemo_lmpo.model.build import build_model_chunks, parameter_dtype
from nemo_lmpo.model.kernels import Kernels, choose_kernels, this_device
from nemo_lmpo.model.lora import add_adapters
from nemo_lmpo.model.packed_gpt import PackedGPTModel
from nemo_lmpo.parallel.groups import ParallelGroups
from nemo_lmpo.parallel.shards import own_part
from nemo_lmpo.sizing.memory import logprob_chunk
from nemo_lmpo.training.batches import StepBatch
from nemo_lmpo.training.example_table import ExampleTable
from nemo_lmpo.training.expert_load import ExpertLoad
from nemo_lmpo.training.optimizer import gather_weights, wrap_data_parallel
from nemo_lmpo.training.pair_metrics import STATISTIC
from nemo_lmpo.training.pipeline import run_pipeline
from nemo_lmpo.training.step import MicroBatchStep


@dataclass(frozen=True)
class StepOutcome:
    """What a step gives, the same on every rank."""

    loss: float
    """Mean over the global batch."""
    metrics: dict[str, float]
    not_finite: list[int]
    """Positions in the global batch whose loss is infinite or not a number."""


def build_frozen_chunks(policy: Policy) -> list[torch.nn.Module]:
    """A second model that lies as the policy's own and is never trained; with weights that are yet to be loaded."""
    chunks = policy.build_chunks()
    for chunk in chunks:
        chunk.requires_grad_(False)
    if policy.config.model.fsdp:
        return list(wrap_data_parallel(chunks, policy.config, policy.groups, policy.device))
    return list(chunks)


def kernels_for(config: Config, architecture: Architecture, *, use_cuda: bool) -> Kernels:
    """The kernels that a run takes on this machine.

    Raises:
        ConfigError: what the configuration asks for cannot run here.
    """
    device = this_device(use_cuda=use_cuda)
    if config.optim.cpu_offload and not device.gpu:
        raise ConfigError(
            "optim.cpu_offload=true has no effect without a GPU: the optimizer is in the host's memory anyway; remove "
            "it"
        )
    return choose_kernels(
        config.model,
        precision=config.trainer.precision,
        head_dim=architecture.head_dim,
        device=device,
    )


@dataclass(eq=False)
class Policy:
    """A megatron-core model with a loss.

    For each step a trainer calls :meth:`prepare_for_training_step`, :meth:`get_loss_and_metrics` and
    :meth:`finish_training_step`, then clips and steps the optimizer.
    """

    config: Config
    architecture: Architecture
    groups: ParallelGroups
    device: torch.device
    """Where the model lives."""
    kernels: Kernels
    """What it is built from."""
    attach_reference: Callable[[StepBatch], None] | None = None
    """Gives a batch its reference log-probabilities, where a reference model is in memory."""

    def __post_init__(self) -> None:
        config = self.config
        self.loss = build_loss(config.loss)
        statistics = self.loss.statistics
        self.statistics = RunningStatistics(statistics) if statistics is not None else None
        chunks = self.build_chunks()
        if config.model.peft.name is not None:
            add_adapters(chunks, config.model.peft, self.architecture, seed=config.model.seed)
        self.chunks = torch.nn.ModuleList(wrap_data_parallel(chunks, config, self.groups, self.device))
        self.expert_load = None
        if self.architecture.experts is not None:
            self.expert_load = ExpertLoad(chunks, self.architecture, config.model, self.groups)
        chunk_tokens = logprob_chunk(config.model, self.architecture)
        self.micro_batch_step = MicroBatchStep(self.loss, self.groups, chunk_tokens, self.device)

    def build_chunks(self) -> list[PackedGPTModel]:
        """Bare model chunks of this process, with weights that are yet to be loaded."""
        return build_model_chunks(
            self.architecture,
            self.config.model,
            groups=self.groups,
            dtype=parameter_dtype(self.config.trainer),
            device=self.device,
            kernels=self.kernels,
        )

    @property
    def models(self) -> list[PackedGPTModel]:
        """The model chunks of this process without wrappers."""
        from megatron.core.utils import unwrap_model

        return cast(list[PackedGPTModel], unwrap_model(list(self.chunks)))

    def whole_models(self) -> list[PackedGPTModel]:
        """As :attr:`models`, with the weights of now, for whoever reads them outside of a step.

        Communicates over the data- and context-parallel group where these are gathered behind forward.
        """
        gather_weights(self.chunks)
        return self.models

    def num_local_parameters(self) -> int:
        """Parameters that this process holds."""
        return sum(own_part(parameter).local.numel() for chunk in self.models for parameter in chunk.parameters())

    def prepare_for_training_step(self) -> None:
        """Clear the gradient buffers."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]

    def get_loss_and_metrics(self, batch: StepBatch, *, forward_only: bool) -> StepOutcome:
        """Mean loss over the global batch and its metrics.

        With ``forward_only=False`` gradients are left in the buffers, and statistics that a loss updates after
        the step are updated.
        """
        table = self.run_batch(batch, forward_only=forward_only)
        metrics = table.metrics()
        if self.statistics is not None and (name := self.statistics.config.log_as) is not None:
            current = self.statistics.current()
            if float(current.count) > 0:  # before the first update there is no mean, and a 0 would flatten the chart
                metrics[f"{name}/mean"], metrics[f"{name}/std"] = float(current.mean), float(current.std)
        if not forward_only and self.statistics is not None and self.statistics.config.update == "after_step":
            self.statistics.update(table.column(STATISTIC))
        if not forward_only and self.expert_load is not None:
            metrics |= self.expert_load.metrics()
        return StepOutcome(metrics["loss"], metrics, table.not_finite())

    def run_batch(self, batch: StepBatch, *, forward_only: bool) -> ExampleTable:
        """Forward (and backward) over the micro-batches; the values of each example of the global batch.

        Communicates: whatever the layout's schedule does, then the sharing of the values over all ranks.
        """
        if self.attach_reference is not None:
            self.attach_reference(batch)
            if batch.mismatched is not None:
                self.attach_reference(batch.mismatched)
        if forward_only or self.expert_load is None or batch.mismatched is not None:
            statistics = self._statistics_of(batch, evaluation=forward_only)
        if forward_only or self.expert_load is None:
            return self._run(batch, statistics, forward_only=forward_only)
        with self.expert_load.counted():
            if batch.mismatched is None:
                statistics = self._statistics_of(batch, evaluation=False)
            if self.expert_load.kind == "global_batch" and not self._has_pass_before(batch):
                self._run(batch, Statistics(), forward_only=True)
        with self.expert_load.balanced(batch), self.expert_load.counted():
            return self._run(batch, statistics, forward_only=False)

    def _has_pass_before(self, batch: StepBatch) -> bool:
        """Whether a training step goes forward over its examples before, for statistics that precede the losses."""
        before = self.statistics is not None and self.statistics.config.update == "before_step"
        return before and batch.mismatched is None

    def _statistics_of(self, batch: StepBatch, *, evaluation: bool) -> Statistics:
        """What the losses of this batch see.

        Statistics that come before the losses are taken in a forward pass of their own: over the batch, or over its
        mismatched answers where it has such. All ranks get the same values in the batch's order from it, so their
        statistics are the same without being sent.
        """
        if self.statistics is None:
            return Statistics()
        config = self.statistics.config
        if config.update != "before_step" or (evaluation and not config.in_evaluation):
            return self.statistics.current()
        observed = self._run(batch.mismatched or batch, Statistics(), forward_only=True)
        return self.statistics.update_in_groups(observed.column(STATISTIC), evaluation=evaluation)

    def _run(self, batch: StepBatch, statistics: Statistics, *, forward_only: bool) -> ExampleTable:
        table = self.micro_batch_step.begin(
            batch.num_examples,
            kind=batch.kind,
            mean_length=batch.mean_length,
            statistics=statistics,
        )
        run_pipeline(
            list(self.chunks), batch.micro_batches, self.micro_batch_step.forward_step, forward_only=forward_only
        )
        table.share(self.groups)
        return table.read()

    def finish_training_step(self) -> None:
        """Sum gradients over all ranks that share weights.

        Communicates over the data- and context-parallel group, over the tensor-parallel group for the norms
        under sequence parallelism, and over first and last stage for tied embeddings.
        """
        from megatron.core.distributed import finalize_model_grads

        # Losses were divided by the global number of pairs already, so no token count is given.
        finalize_model_grads(list(self.chunks))
