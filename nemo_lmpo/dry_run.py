"""What a run would look like and need, told without running it: layout, steps a GPU holds, memory a rank.

The figures are arithmetic on sizes, in GiB, for the busiest rank. Activations are an estimate for one row in
flight a pipeline stage: what megatron-core's layers keep for backward in the run's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_lmpo.architecture import Architecture
from nemo_lmpo.config import Config
from nemo_lmpo.layout import Layout

GIB = 2.0**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the busiest rank."""

    parameters: float
    gradients: float
    """Float32 buffer."""
    optimizer: float
    """Two float32 moments, and float32 main parameters if the model is in BF16."""
    activations: float
    logits: float
    """One chunk of float32 logits and its gradient, and the float32 gradient of the output matrix."""

    @property
    def total(self) -> float:
        """All of it; allocator overhead, kernels' workspaces and communication buffers come on top."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.logits


def stage_parameters(architecture: Architecture, config: Config) -> float:
    """Parameters of the busiest rank: a first or last pipeline stage's share of layers and embeddings."""
    model = config.model
    tensor, stages = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    rows = architecture.padded_vocab_size(model.make_vocab_size_divisible_by, tensor)
    matrices = 1 if stages > 1 or architecture.tie_word_embeddings else 2
    embeddings = matrices * rows * architecture.hidden_size
    plain_embeddings = (1 if architecture.tie_word_embeddings else 2) * architecture.vocab_size
    layers = architecture.num_parameters() - plain_embeddings * architecture.hidden_size
    return embeddings / tensor + layers / (tensor * stages)


def activation_bytes(architecture: Architecture, config: Config, row_tokens: int) -> float:
    """Bytes kept for backward on the busiest rank."""
    model = config.model
    size = 2 if config.trainer.precision == "bf16" else 4
    tensor, stages = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    tokens = row_tokens / model.context_parallel_size
    split = tensor if model.sequence_parallel else 1
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    query = architecture.num_attention_heads * architecture.head_dim
    key_value = 2 * architecture.num_query_groups * architecture.head_dim
    # Inputs of two norms, of QKV, of the projection's residual sum and of the MLP: the parts outside tensor
    # parallelism; then QKV, attention's output and the MLP's three inner states inside it.
    outside = 4 * hidden * tokens * size / split
    inside = (query + key_value + 2 * query + 4 * ffn) * tokens * size / tensor
    layers = architecture.num_layers / stages
    # The first of the stages has as many rows in flight as there are stages.
    in_flight = stages
    if model.activations_checkpoint_granularity == "full":
        kept = hidden * tokens * size / split * math.ceil(layers / model.activations_checkpoint_num_layers)
        return kept * in_flight + model.activations_checkpoint_num_layers * (outside + inside)
    return (outside + inside) * layers * in_flight


def estimate_memory(layout: Layout) -> MemoryEstimate:
    """Memory of the busiest rank."""
    config, architecture = layout.config, layout.architecture
    parameters = stage_parameters(architecture, config)
    low_precision = config.trainer.precision == "bf16"
    shards = layout.data_parallel_size * config.model.context_parallel_size
    optimizer = (12.0 if low_precision else 8.0) * parameters
    if config.optim.use_distributed_optimizer:
        optimizer /= max(shards, 1)
    tensor = config.model.tensor_model_parallel_size
    rows = architecture.padded_vocab_size(config.model.make_vocab_size_divisible_by, tensor) / tensor
    chunk = config.model.logprob_chunk_tokens
    return MemoryEstimate(
        parameters=parameters * (2 if low_precision else 4),
        gradients=parameters * 4,
        optimizer=optimizer,
        activations=activation_bytes(architecture, config, config.data.row_budget),
        logits=2 * 4 * chunk * rows + 4 * rows * architecture.hidden_size,
    )


def describe(layout: Layout) -> str:
    """The dry run's text."""
    config, model = layout.config, layout.config.model
    memory = estimate_memory(layout)
    nodes = f"{config.trainer.num_nodes} node(s) x {config.trainer.devices} device(s)"
    chunks = model.virtual_pipeline_model_parallel_size
    facts = [
        ("recipe", config.name),
        ("loss", config.loss.name),
        ("processes", f"{layout.world_size} ({nodes})"),
        (
            "layout",
            f"TP {model.tensor_model_parallel_size} x PP {model.pipeline_model_parallel_size}"
            + (f" (VPP {chunks})" if chunks else "")
            + f" x CP {model.context_parallel_size} x DP {layout.data_parallel_size}"
            + (", sequence parallel" if model.sequence_parallel else "")
            + (", distributed optimizer" if config.optim.use_distributed_optimizer else ""),
        ),
        ("precision", config.trainer.precision),
        ("recompute", model.activations_checkpoint_granularity or "none"),
        ("parameters", f"{layout.architecture.num_parameters():,}"),
        (
            "global batch",
            f"{model.global_batch_size} pairs, {model.global_batch_size // layout.data_parallel_size} a replica",
        ),
        ("row", f"at most {config.data.row_budget} tokens"),
    ]
    table = [
        ("parameters", memory.parameters),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("activations", memory.activations),
        ("logits", memory.logits),
        ("together", memory.total),
    ]
    lines = [f"{name:<13} {value}" for name, value in facts]
    lines += ["", "memory expected on the busiest rank, GiB"]
    lines += [f"  {name:<12} {amount / GIB:8.2f}" for name, amount in table]
    lines += ["", "The configuration is valid. Nothing was started."]
    return "\n".join(lines)
