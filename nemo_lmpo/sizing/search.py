"""Layouts of a model on a machine: those that the rules allow and the memory holds, fastest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from nemo_lmpo.config.rules import ParallelLayout, validate
from nemo_lmpo.config.schema import Config
from nemo_lmpo.errors import ConfigError, first_line
from nemo_lmpo.formats.architecture import Architecture
from nemo_lmpo.sizing.cards import Machine
from nemo_lmpo.sizing.flops import shape_of
from nemo_lmpo.sizing.memory import estimate_memory
from nemo_lmpo.sizing.rank_work import split_of
from nemo_lmpo.sizing.step_time import StepTime, step_time
from nemo_lmpo.sizing.typical_rows import row_of, step_rows
from nemo_lmpo.sizing.uncertainty import fast_end, slow_end

FRAGMENTATION, CONTEXT = 1.07, 3.0 * 2**30
"""What the allocator and the libraries take beside the tensors: a share of them, and bytes of CUDA and NCCL."""


@dataclass(frozen=True)
class Candidate:
    """A layout that fits."""

    layout: ParallelLayout
    memory: float
    """Bytes of tensors on the busiest rank."""
    time: StepTime
    slow: float
    """Seconds of a step where everything assumed is at its slow end."""
    fast: float
    """The same at the fast end."""

    def time_on(self, machine: Machine) -> StepTime:
        """Time of a step on another machine with as many GPUs."""
        return layout_time(self.layout, machine)

    @property
    def examples_per_second(self) -> float:
        """Rows of data, of all GPUs."""
        return self.layout.config.model.global_batch_size / self.time.total

    def overrides(self) -> list[str]:
        """What makes a recipe this layout."""
        model, optim, data = self.layout.config.model, self.layout.config.optim, self.layout.config.data
        given = {
            "model.tensor_model_parallel_size": model.tensor_model_parallel_size,
            "model.pipeline_model_parallel_size": model.pipeline_model_parallel_size,
            "model.virtual_pipeline_model_parallel_size": model.virtual_pipeline_model_parallel_size,
            "model.account_for_embedding_in_pipeline_split": str(model.account_for_embedding_in_pipeline_split).lower(),
            "model.account_for_loss_in_pipeline_split": str(model.account_for_loss_in_pipeline_split).lower(),
            "model.context_parallel_size": model.context_parallel_size,
            "model.expert_model_parallel_size": model.expert_model_parallel_size,
            "model.fsdp": str(model.fsdp).lower(),
            "model.sequence_parallel": str(model.sequence_parallel).lower(),
            "model.activations_checkpoint_granularity": model.activations_checkpoint_granularity,
            "data.row_tokens": data.row_tokens,
            "optim.use_distributed_optimizer": str(optim.use_distributed_optimizer).lower(),
            "optim.overlap_grad_reduce": str(optim.overlap_grad_reduce).lower(),
        }
        always = ("model.tensor_model_parallel_size", "model.sequence_parallel")
        plain = (None, 1, "false")
        return [f"{name}={value}" for name, value in given.items() if name in always or value not in plain]


def rank_layouts(config: Config, architecture: Architecture, machine: Machine) -> list[Candidate]:
    """All layouts that fit, fastest first.

    Raises:
        ConfigError: none does, or the card cannot do what the settings ask for.
    """
    check_card(config, machine)
    found: dict[tuple[object, ...], Candidate] = {}
    refused: list[str] = []
    for layout in _layouts(config, architecture, machine, refused):
        memory = estimate_memory(layout).total
        if not fits(memory, machine):
            continue
        rows, _ = step_rows(layout.config, layout.data_parallel_size)
        usual, slow, fast = (layout_time(layout, each) for each in (machine, slow_end(machine), fast_end(machine)))
        candidate = Candidate(layout, memory, usual, slow.total, fast.total)
        # Of row budgets that differ in nothing the smallest stands.
        found.setdefault((split_of(layout), rows), candidate)
    if not found:
        reason = f"; for example {refused[0]}" if refused else ""
        raise ConfigError(
            f"no layout of {config.name} fits {machine.gpus} x {machine.card.name}{reason}; give more GPUs, or a "
            f"model.global_batch_size that replicas divide"
        )
    return sorted(found.values(), key=lambda candidate: candidate.time.total)


def check_card(config: Config, machine: Machine) -> None:
    """Refuse what no layout could make up for.

    Raises:
        ConfigError: FP8 on a card that has none.
    """
    if config.model.fp8 is not None and not machine.card.peak_fp8:
        raise ConfigError(
            f"model.fp8={config.model.fp8} needs a GPU with FP8 (H100 or newer), and {machine.card.name} has none; "
            f"unset it, or plan for another card, as GPUS={machine.nodes}x{machine.card.node}xH100"
        )


def fits(memory: float, machine: Machine) -> bool:
    """Whether so many bytes of tensors leave room for the allocator and the libraries."""
    return memory * FRAGMENTATION + CONTEXT <= machine.card.memory


def layout_time(layout: ParallelLayout, machine: Machine) -> StepTime:
    """Time of a step of typical rows of data."""
    rows, row = step_rows(layout.config, layout.data_parallel_size)
    return step_time(shape_of(layout.architecture), split_of(layout), row, rows, machine)


def _layouts(
    config: Config, architecture: Architecture, machine: Machine, refused: list[str]
) -> Iterator[ParallelLayout]:
    powers = [2**power for power in range(8)]
    tensors = [size for size in powers if size <= machine.card.node]
    stages = [size for size in range(1, 65) if machine.gpus % size == 0]
    least = 2 * config.data.max_length  # two full-length sequences
    for tensor, stage, context, recompute, times in product(
        tensors, stages, (1, 2, 4), granularities(config, architecture), (1, 2, 4)
    ):
        if machine.gpus % (tensor * stage * context):
            continue
        choices = product(_virtual_stages(architecture, stage), _expert_splits(architecture, machine, stage))
        for (virtual, counted), (expert, fsdp) in choices:
            replicas = machine.gpus // (tensor * stage)
            if fsdp and (replicas == 1 or stage > 1):
                continue
            model = replace(
                config.model,
                tensor_model_parallel_size=tensor,
                sequence_parallel=tensor > 1,
                pipeline_model_parallel_size=stage,
                virtual_pipeline_model_parallel_size=virtual,
                account_for_embedding_in_pipeline_split=counted,
                account_for_loss_in_pipeline_split=counted,
                context_parallel_size=context,
                expert_model_parallel_size=expert,
                expert_tensor_parallel_size=1,
                activations_checkpoint_granularity=recompute,
                fsdp=fsdp,
            )
            shared = replicas > 1 and not fsdp
            optim = replace(
                config.optim,
                use_distributed_optimizer=shared or (config.optim.cpu_offload and not fsdp),
                overlap_grad_reduce=shared,
            )
            data = replace(config.data, row_tokens=least * times)
            changed = replace(config, model=model, optim=optim, data=data)
            try:
                yield validate(changed, architecture, machine.gpus)
            except ConfigError as error:
                refused.append(first_line(error))


def granularities(config: Config, architecture: Architecture) -> list[Literal["selective", "full"] | None]:
    """What a layer may compute again in backward: nothing, its MLP (not tried with a mixture), or all.

    Named modules are valid with `selective` alone.
    """
    if config.model.recompute_modules != type(config.model)().recompute_modules:
        return ["selective"]
    return [None, "full"] if architecture.experts is not None else [None, "selective", "full"]


def _expert_splits(architecture: Architecture, machine: Machine, stages: int) -> list[tuple[int, bool]]:
    """Ranks that a layer's experts may lie on, none of which goes with FSDP; and FSDP, for a dense model."""
    if architecture.experts is None:
        return [(1, False), (1, True)]
    ranks, powers = machine.gpus // stages, [2**power for power in range(8)]
    return [(size, False) for size in powers if architecture.experts.number % size == 0 and ranks % size == 0]


def _virtual_stages(architecture: Architecture, stages: int) -> list[tuple[int | None, bool]]:
    """Numbers of virtual stages that divide the layers, and whether embedding and loss have to count as layers."""
    if stages == 1:
        return [(None, False)]
    for counted in (False, True):
        layers = architecture.num_layers + 2 * counted
        if layers % stages == 0:
            divisors = [number for number in (2, 3, 4, 5, 8) if layers // stages % number == 0]
            return [(None, counted), *((number, counted) for number in divisors)]
    return []


def model_flops(candidate: Candidate) -> float:
    """Of a step of typical rows of data over all GPUs, by the mathematics of the model."""
    config = candidate.layout.config
    row = row_of(config, config.model.global_batch_size)
    return shape_of(candidate.layout.architecture).model_flops(row.tokens, row.predicted, row.attended)
