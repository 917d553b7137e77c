"""Checks a configuration against a model and a number of processes before any work is done.

Every rule names the field, its value, why it cannot be, and what to do instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nemo_lmpo.config.architecture import Architecture, check_architecture
from nemo_lmpo.config.duration import parse_duration
from nemo_lmpo.config.schema import Config
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.loss.registry import LOSSES


@dataclass(frozen=True)
class ParallelLayout:
    """A configuration together with what it is to run on."""

    config: Config
    architecture: Architecture
    world_size: int

    @property
    def model_parallel_size(self) -> int:
        """Processes that share one copy of the data."""
        model = self.config.model
        return model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Replicas that see different pairs."""
        return self.world_size // self.model_parallel_size


def _positive_sizes(layout: ParallelLayout) -> Iterator[str]:
    model = layout.config.model
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "global_batch_size",
        "make_vocab_size_divisible_by",
        "logprob_chunk_tokens",
        "activations_checkpoint_num_layers",
    ):
        if getattr(model, name) < 1:
            yield f"model.{name}={getattr(model, name)} must be at least 1"
    trainer = layout.config.trainer
    for name in ("devices", "num_nodes"):
        if getattr(trainer, name) < 1:
            yield f"trainer.{name}={getattr(trainer, name)} must be at least 1"
    if trainer.num_threads is not None and trainer.num_threads < 1:
        yield f"trainer.num_threads={trainer.num_threads} must be at least 1; unset it to share the cores"
    if model.micro_batch_size is not None and model.micro_batch_size < 1:
        yield f"model.micro_batch_size={model.micro_batch_size} must be at least 1; unset it for no limit"


def _world_size(layout: ParallelLayout) -> Iterator[str]:
    model = layout.config.model
    if layout.world_size % layout.model_parallel_size:
        yield (
            f"{layout.world_size} processes do not divide by model.tensor_model_parallel_size="
            f"{model.tensor_model_parallel_size} x model.pipeline_model_parallel_size="
            f"{model.pipeline_model_parallel_size} x model.context_parallel_size={model.context_parallel_size}; "
            f"start a multiple of {layout.model_parallel_size} processes or change the layout"
        )


def _global_batch(layout: ParallelLayout) -> Iterator[str]:
    size, replicas = layout.config.model.global_batch_size, max(layout.data_parallel_size, 1)
    if size % replicas:
        yield (
            f"model.global_batch_size={size} does not divide by the data-parallel size {replicas}; "
            f"choose a multiple of {replicas}"
        )


def _tensor_parallel(layout: ParallelLayout) -> Iterator[str]:
    tensor = layout.config.model.tensor_model_parallel_size
    shape = layout.architecture
    for what, size in (
        ("num_attention_heads", shape.num_attention_heads),
        ("num_key_value_heads", shape.num_query_groups),
        ("hidden_size", shape.hidden_size),
        ("intermediate_size", shape.ffn_hidden_size),
    ):
        if size % tensor:
            yield (
                f"model.tensor_model_parallel_size={tensor} does not divide the model's {what}={size}; "
                f"choose a divisor of it"
            )
    if layout.config.model.sequence_parallel and tensor == 1:
        yield (
            "model.sequence_parallel=true needs model.tensor_model_parallel_size of at least 2; "
            "set it to false, there is nothing to split"
        )


def _pipeline(layout: ParallelLayout) -> Iterator[str]:
    model, layers = layout.config.model, layout.architecture.num_layers
    stages, chunks = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
    if layers % stages:
        yield (
            f"model.pipeline_model_parallel_size={stages} does not divide the model's {layers} layers; "
            f"choose a divisor of {layers}"
        )
    if chunks is None:
        return
    if stages == 1:
        yield (
            f"model.virtual_pipeline_model_parallel_size={chunks} needs model.pipeline_model_parallel_size of at "
            f"least 2; unset it"
        )
    elif chunks < 2:
        yield f"model.virtual_pipeline_model_parallel_size={chunks} must be at least 2; unset it for one chunk a stage"
    elif layers % (stages * chunks):
        yield (
            f"model.pipeline_model_parallel_size={stages} x model.virtual_pipeline_model_parallel_size={chunks} does "
            f"not divide the model's {layers} layers; choose a divisor of {layers}"
        )


def _recompute(layout: ParallelLayout) -> Iterator[str]:
    model = layout.config.model
    if model.activations_checkpoint_granularity not in (None, "selective", "full"):
        yield (
            f"model.activations_checkpoint_granularity={model.activations_checkpoint_granularity!r} is unknown; "
            f"choose selective or full, or unset it"
        )
    if model.activations_checkpoint_method not in ("uniform", "block"):
        yield (
            f"model.activations_checkpoint_method={model.activations_checkpoint_method!r} is unknown; "
            f"choose uniform or block"
        )
    layers = layout.architecture.num_layers // model.pipeline_model_parallel_size
    layers //= model.virtual_pipeline_model_parallel_size or 1
    unit, uniform = model.activations_checkpoint_num_layers, model.activations_checkpoint_method == "uniform"
    if model.activations_checkpoint_granularity == "full" and uniform and layers and layers % unit:
        yield (
            f"model.activations_checkpoint_num_layers={unit} does not divide the {layers} layers of a stage, which "
            f"model.activations_checkpoint_method=uniform cuts into equal units; choose a divisor of {layers}, or block"
        )


def _lengths(layout: ParallelLayout) -> Iterator[str]:
    data = layout.config.data
    if data.max_prompt_length >= data.max_length:
        yield (
            f"data.max_prompt_length={data.max_prompt_length} leaves no room for a response within "
            f"data.max_length={data.max_length}; lower it"
        )
    if data.max_prompt_length < 1:
        yield f"data.max_prompt_length={data.max_prompt_length} must be at least 1"
    if data.max_length > layout.architecture.max_position_embeddings:
        yield (
            f"data.max_length={data.max_length} is more than the model's max_position_embeddings="
            f"{layout.architecture.max_position_embeddings}; lower it"
        )
    longest = 2 * data.max_length - (data.max_prompt_length if data.share_prompt else 0)
    if data.row_tokens is not None and data.row_tokens < longest:
        yield (
            f"data.row_tokens={data.row_tokens} may be too small for one pair of data.max_length={data.max_length}; "
            f"set it to at least {2 * data.max_length}, or unset it"
        )


def _choices(layout: ParallelLayout) -> Iterator[str]:
    config = layout.config
    for name, value, allowed in (
        ("trainer.precision", config.trainer.precision, ("bf16", "32")),
        ("data.on_bad_row", config.data.on_bad_row, ("error", "skip")),
        ("checkpoint.mode", config.checkpoint.mode, ("min", "max")),
        ("optim.sched.name", config.optim.sched.name, ("cosine", "linear", "constant")),
        ("model.attention_backend", config.model.attention_backend, ("auto", "flash", "te", "sdpa")),
    ):
        if value not in allowed:
            yield f"{name}={value!r} is unknown; choose {', '.join(allowed)}"


def _reference(layout: ParallelLayout) -> Iterator[str]:
    config = layout.config
    if config.model.reference_in_memory and not LOSSES[config.loss.name].needs_reference:
        yield (
            f"model.reference_in_memory=true, but loss.name={config.loss.name} compares with no reference model; "
            f"remove it"
        )


def _numbers(layout: ParallelLayout) -> Iterator[str]:
    config = layout.config
    for name, value in (
        ("optim.lr", config.optim.lr),
        ("optim.weight_decay", config.optim.weight_decay),
        ("optim.sched.min_lr", config.optim.sched.min_lr),
        ("trainer.gradient_clip_val", config.trainer.gradient_clip_val),
        ("trainer.val_check_interval", config.trainer.val_check_interval),
        ("checkpoint.save_interval", config.checkpoint.save_interval),
        ("checkpoint.keep_best", config.checkpoint.keep_best),
    ):
        if not value >= 0:
            yield f"{name}={value} must not be negative"
    if not config.optim.eps > 0:
        yield f"optim.eps={config.optim.eps} must be above 0: AdamW would divide by zero; leave it at 1e-8"
    if not 0 <= config.optim.sched.warmup_fraction < 1:
        yield f"optim.sched.warmup_fraction={config.optim.sched.warmup_fraction} must be at least 0 and below 1"
    if config.optim.sched.min_lr > config.optim.lr >= 0:
        yield f"optim.sched.min_lr={config.optim.sched.min_lr} is above optim.lr={config.optim.lr}; lower it"
    if len(config.optim.betas) != 2 or not all(0 <= beta < 1 for beta in config.optim.betas):
        yield f"optim.betas={config.optim.betas} must be two numbers from 0 to below 1, as [0.9, 0.999]"
    if config.trainer.max_steps is not None and config.trainer.max_steps < 1:
        yield f"trainer.max_steps={config.trainer.max_steps} must be at least 1; unset it to train max_epochs"
    if config.trainer.max_epochs < 1:
        yield f"trainer.max_epochs={config.trainer.max_epochs} must be at least 1"
    try:
        parse_duration(config.trainer.max_time_per_run)
    except ConfigError as error:
        yield str(error)
    if config.checkpoint.keep_last < 1:
        yield f"checkpoint.keep_last={config.checkpoint.keep_last} must be at least 1: resuming needs one"


RULES: tuple[Callable[[ParallelLayout], Iterator[str]], ...] = (
    _positive_sizes,
    _world_size,
    _global_batch,
    _tensor_parallel,
    _pipeline,
    _recompute,
    _lengths,
    _choices,
    _reference,
    _numbers,
)


def validate(config: Config, architecture: Architecture, world_size: int) -> ParallelLayout:
    """Refuse what would fail or be wrong.

    Raises:
        ConfigError: with every violation, one a line.
    """
    check_architecture(architecture)
    layout = ParallelLayout(config, architecture, world_size)
    problems = list(_positive_sizes(layout))
    if not problems:  # the other rules divide by these sizes
        problems = [problem for rule in RULES[1:] for problem in rule(layout)]
    if problems:
        raise ConfigError("\n".join(problems))
    return layout
