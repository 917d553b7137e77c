"""Runs one rank's step on fake tensors: the real model, optimizer, schedule, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from nemo_lmpo.config.rules import ParallelLayout
from nemo_lmpo.config.schema import Config
from nemo_lmpo.data.example import Example, Response
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.parallel.groups import ParallelGroups, create_groups
from nemo_lmpo.sizing.rank_work import RowSize
from nemo_lmpo.sizing.typical_rows import Lengths, filling_lengths, rows_of_data
from nemo_lmpo.sizing.work import Work
from nemo_lmpo.trace.meter import Meter
from nemo_lmpo.trace.world import (
    add_gradients_in_place,
    fake_world,
    gpu_kernels,
    make_moments,
    measured,
    names_of_groups,
    use_gpu_form,
)
from nemo_lmpo.training.batches import BatchBuilder, ExampleList
from nemo_lmpo.training.optimizer import build_optimizer, clip_and_step, gradient_norm
from nemo_lmpo.training.policy import Policy, build_frozen_chunks
from nemo_lmpo.training.reference import ResponseSums

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Phase:
    """Memory of one part of a step."""

    name: str
    after: int
    """Bytes alive when it is over."""
    peak: int
    """Most bytes alive while it lasts."""


@dataclass
class Trace:
    """What one rank does in a step."""

    rank: int
    transformer_engine: bool
    micro_batches: int
    """How many were executed; a real step has more, which need no more memory."""
    row: RowSize = field(default_factory=lambda: RowSize(0, 0, 0))
    """A micro-batch, filled up to the budget."""
    phases: list[Phase] = field(default_factory=list)
    forward_backward: Work = field(default_factory=Work)
    """All micro-batches."""
    end_of_step: Work = field(default_factory=Work)
    """Gradient reduction, clipping and the optimizer's step."""

    @property
    def peak(self) -> int:
        """Most bytes alive in a step; building the model is over by then."""
        return max(phase.peak for phase in self.phases if phase.name in (FORWARD_BACKWARD, REDUCE, CLIP, STEP))

    @property
    def micro_batch(self) -> Work:
        """Forward and backward of one of the micro-batches."""
        return self.forward_backward.times(1 / self.micro_batches)


MODEL, OPTIMIZER, FORWARD_BACKWARD = "model and gradients", "optimizer", "forward and backward"
REDUCE, CLIP, STEP = "gradient reduction", "gradient norm", "optimizer step"
REFERENCE = "reference model"


def micro_batches_to_run(layout: ParallelLayout) -> int:
    """As few as fill the pipeline, so that the first stage holds as much as it ever does."""
    model = layout.config.model
    stages = model.pipeline_model_parallel_size
    if stages == 1:
        return 2
    return stages * 2 if model.virtual_pipeline_model_parallel_size else stages + 1


def trace_rank(layout: ParallelLayout, rank: int, *, transformer_engine: bool) -> Trace:
    """Execute a step of ``rank``.

    Args:
        layout: configuration, architecture and number of processes.
        rank: which of them to be.
        transformer_engine: with the fused forms that Transformer Engine brings.

    Raises:
        ConfigError: what only Transformer Engine's own layers do.
    """
    _refuse_layers_of_transformer_engine(layout.config)
    micro_batches = micro_batches_to_run(layout)
    with fake_world(layout.world_size, rank):
        groups = create_groups(layout.config.model)
        meter = Meter(names_of_groups(groups))
        trace = Trace(rank, transformer_engine, micro_batches)
        _run(layout, groups, meter, trace)
    return trace


def _refuse_layers_of_transformer_engine(config: Config) -> None:
    """Raise where what is asked for happens inside of layers that others stand in for here."""
    model = config.model
    wanted = {f"model.fp8={model.fp8}": model.fp8 is not None, "model.tp_comm_overlap=true": model.tp_comm_overlap}
    for setting in (name for name, on in wanted.items() if on):
        raise ConfigError(
            f"{setting} cannot be traced: Transformer Engine's layers do it, in whose place the trace has "
            f"megatron-core's own; use dry_run=plan or dry_run=true, which count it, or unset it for the trace"
        )


def _run(layout: ParallelLayout, groups: ParallelGroups, meter: Meter, trace: Trace) -> None:
    config = layout.config
    mark = partial(_mark, meter, trace)
    mixture = layout.architecture.experts is not None
    examples = filling_examples(config, trace.micro_batches * layout.data_parallel_size)
    # Lengths and layouts are values, so the batch is a real one.
    builder = BatchBuilder(config, groups, device=CPU, pad_id=0, mixture=mixture)
    batch = builder.build(examples, np.arange(len(examples)))
    rows = trace.micro_batches * layout.data_parallel_size
    trace.row = RowSize(batch.tokens // rows, batch.predicted // rows, batch.attended // rows)
    with measured(meter, transformer_engine=trace.transformer_engine):
        policy = Policy(config, layout.architecture, groups, CPU, kernels=gpu_kernels(layout))
        if trace.transformer_engine and not config.model.fsdp:
            add_gradients_in_place(policy.models, meter)
        mark(MODEL)
        optimizer = build_optimizer(list(policy.chunks), config)
        use_gpu_form(optimizer)
        make_moments(optimizer)
        mark(OPTIMIZER)
        if config.model.reference_in_memory:
            policy.attach_reference = ResponseSums(policy, build_frozen_chunks(policy)).attach
            mark(REFERENCE)
        policy.prepare_for_training_step()
        optimizer.zero_grad()
        before = copy.deepcopy(meter.work)
        policy.get_loss_and_metrics(batch, forward_only=False)
        mark(FORWARD_BACKWARD)
        trace.forward_backward = meter.work.since(before)
        before = copy.deepcopy(meter.work)
        _finish(policy, optimizer, meter, mark)
        trace.end_of_step = meter.work.since(before)


def filling_examples(config: Config, micro_batches: int) -> ExampleList:
    """As many pairs or conversations as fill ``micro_batches`` up to the row's budget, all of the same lengths.

    Their ids are of no consequence, and neither are the reference log-probabilities that some losses want.
    """
    return ExampleList([_example(filling_lengths(config))] * (rows_of_data(config) * micro_batches))


def _example(lengths: Lengths) -> Example:
    prompt, first, *others = ([1] * length for length in (lengths.prompt, *lengths.responses))
    if others:
        return Example.pair("0", prompt, first, others[0], -1.0, -1.0, (-1.0, -1.0))
    # what is not predicted stands in the midst, as the user's further turns do
    gap = len(first) - lengths.predicted
    return Example("0", prompt, (Response(first, ((0, 1), (gap + 1, len(first))) if gap else None),))


def _finish(policy: Policy, optimizer: MegatronOptimizer, meter: Meter, mark: Callable[[str], None]) -> None:
    """What the trainer does after backward."""
    policy.finish_training_step()
    mark(REDUCE)
    norm = gradient_norm(optimizer)
    mark(CLIP)
    reads = meter.work.host_reads
    clip_and_step(optimizer, norm, policy.config.trainer.gradient_clip_val)
    meter.work.host_reads = reads  # AdamW reads its step counts, which torch keeps on the host
    mark(STEP)


def _mark(meter: Meter, trace: Trace, name: str) -> None:
    trace.phases.append(Phase(name, meter.now, meter.peak))
    meter.restart_peak()
