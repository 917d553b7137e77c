"""Memory that a layout is expected to need, from sizes alone: for the busiest rank, before anything is started.

Activations are what megatron-core's layers keep for backward in the run's dtype, for as many rows as the pipeline
schedule has in flight on the first stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_lmpo.config.rules import ParallelLayout
from nemo_lmpo.config.schema import Config, ModelConfig
from nemo_lmpo.formats.architecture import Architecture, Experts
from nemo_lmpo.formats.lora_targets import MLP, projections_of
from nemo_lmpo.sizing.row_length import longest_row

LOGIT_BYTES = 2**29
"""Float32 logits that exist at a time, unless `model.logprob_chunk_tokens` says otherwise."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the busiest rank."""

    parameters: float
    gradients: float
    """Float32 buffer."""
    optimizer: float
    """Two moments (`optim.moments_dtype`), and float32 main parameters if the model is in BF16."""
    activations: float
    logits: float
    """One chunk of float32 logits and its gradient, and room that autograd asks for beside the output matrix."""
    reference: float
    """Parameters of a reference model in memory."""
    step: float = 0.0
    """What the end of backward takes for itself, when activations and logits are free again. AdamW's step takes next to
    nothing: its kernels are fused, and bfloat16 moments are float32 a few at a time."""
    gathered: float = 0.0
    """Whole weights, and gradients on their way to be shared out, where ranks share weights."""

    @property
    def total(self) -> float:
        """The most at a time; allocator overhead, kernels' workspaces and communication buffers come on top."""
        kept = self.parameters + self.gradients + self.optimizer + self.reference
        return kept + max(self.activations + self.logits + self.gathered, self.step)


def stage_parameters(architecture: Architecture, config: Config) -> float:
    """Parameters of the busiest rank: a first or last pipeline stage's share of layers and embeddings."""
    model = config.model
    tensor, stages = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    matrices = 1 if architecture.tie_word_embeddings else 2
    layers = architecture.num_parameters() - matrices * architecture.vocab_size * architecture.hidden_size
    layers -= architecture.num_expert_parameters()
    embeddings = (1 if stages > 1 else matrices) * vocabulary_rows(model, architecture) * architecture.hidden_size
    return embeddings + layers / (tensor * stages) + stage_expert_parameters(architecture, config)


def stage_expert_parameters(architecture: Architecture, config: Config) -> float:
    """Those of them that are experts'."""
    stages = config.model.pipeline_model_parallel_size
    return architecture.num_expert_parameters() / (experts_cut(config.model) * stages)


def experts_cut(model: ModelConfig) -> int:
    """Ranks over which a layer's experts, or parts of them, lie."""
    return model.expert_model_parallel_size * model.expert_tensor_parallel_size


def adapter_parameters(architecture: Architecture, config: Config) -> float:
    """Parameters of the adapters on the busiest rank."""
    model = config.model
    tensor = model.tensor_model_parallel_size
    hidden = architecture.hidden_size
    query = architecture.num_attention_heads * architecture.head_dim
    key = architecture.num_query_groups * architecture.head_dim
    # A rank has a part of the width inside of the block: A is whole and B split where that is the output, and reversed.
    attention = {"q_proj": query, "k_proj": key, "v_proj": key, "o_proj": query}
    dense = {**attention, **({} if architecture.experts else dict.fromkeys(MLP, architecture.mlp_size))}
    inside = [dense[name] for name in projections_of(model.peft.target_modules) if name in dense]
    layers = architecture.num_layers / model.pipeline_model_parallel_size
    on_experts = expert_adapter_parameters(architecture, config)
    return layers * model.peft.rank * sum(hidden + width / tensor for width in inside) + on_experts


def expert_adapter_parameters(architecture: Architecture, config: Config) -> float:
    """Those of them that are on experts."""
    model = config.model
    if architecture.experts is None or model.peft.name is None:
        return 0.0
    experts = architecture.experts.number / model.expert_model_parallel_size
    width = architecture.mlp_size / model.expert_tensor_parallel_size
    adapted = len(set(projections_of(model.peft.target_modules)) & set(MLP))
    layers = architecture.num_layers / model.pipeline_model_parallel_size
    return layers * experts * adapted * model.peft.rank * (architecture.hidden_size + width)


def trained_experts_part(architecture: Architecture, config: Config) -> float:
    """What part of a stage's trained parameters is of experts, or of adapters on them."""
    if config.model.peft.name is not None:
        return expert_adapter_parameters(architecture, config) / adapter_parameters(architecture, config)
    return stage_expert_parameters(architecture, config) / stage_parameters(architecture, config)


def activation_bytes(architecture: Architecture, config: Config, row_tokens: int) -> float:
    """Bytes kept for backward on the busiest rank."""
    model = config.model
    size, tensor = number_bytes(config), model.tensor_model_parallel_size
    tokens = row_tokens / model.context_parallel_size
    split = tensor if model.sequence_parallel else 1
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    query = architecture.num_attention_heads * architecture.head_dim
    key_value = 2 * architecture.num_query_groups * architecture.head_dim
    # Inputs and outputs of two norms lie outside tensor parallelism. Inside it: QKV, the rotated queries and
    # attention's output, and around the fused SwiGLU its two inputs and its output.
    outside = 4 * hidden * tokens * size / split
    inside = (query + key_value + 2 * query) * tokens * size / tensor
    if architecture.family.qk_norm:
        inside += (query + key_value / 2) * tokens * size / tensor  # laid out for the norms over heads
    if architecture.experts is None:
        inside += 3 * ffn * tokens * size / tensor
    else:
        inside += _expert_bytes(architecture.experts, hidden, config, tokens / split)
    chunks, layers = chunks_in_flight(model), layers_per_chunk(architecture, model)
    if model.activations_checkpoint_granularity is None:
        return chunks * layers * (outside + inside)
    if model.activations_checkpoint_granularity == "selective":
        # The kernel of attention keeps nothing that its neighbors do not keep. A layer is whole again in its backward.
        again = 3 * ffn * tokens * size / tensor if "mlp" in model.recompute_modules else 0.0
        return chunks * layers * (outside + inside - again) + again
    layer_input, unit = hidden * tokens * size / split, model.activations_checkpoint_num_layers
    if model.activations_checkpoint_method == "block":
        recomputed = min(unit, layers)
        kept = recomputed * layer_input + (layers - recomputed) * (outside + inside)
        return chunks * kept + (outside + inside)
    return chunks * math.ceil(layers / unit) * layer_input + unit * (outside + inside)


def _expert_bytes(experts: Experts, hidden: int, config: Config, tokens: float) -> float:
    """Bytes that a layer's router and experts keep for backward of ``tokens`` with even loads, on a rank.

    Around each expert's activation, which weighs its output by the choice, two inputs and that output; a choice's token
    before the experts; and of the router the float32 logits, softmaxes and maps of choices.
    """
    size, tensor = number_bytes(config), config.model.expert_tensor_parallel_size
    rows = tokens * experts.per_token * tensor
    return (3 * experts.ffn_hidden_size / tensor + hidden) * rows * size + 12 * experts.number * tokens


def layers_per_chunk(architecture: Architecture, model: ModelConfig) -> int:
    """Layers of a pipeline stage, or of one of its virtual stages: of the fullest."""
    virtual = model.virtual_pipeline_model_parallel_size or 1
    return model.pipeline_slots(architecture.num_layers) // (model.pipeline_model_parallel_size * virtual)


def chunks_in_flight(model: ModelConfig) -> int:
    """Forward passes through a chunk of layers that the first stage holds before the first backward frees one.

    1F1B warms up one a stage. Its interleaved form warms up 2 (stages - 1) + (virtual - 1) stages and adds one.
    """
    stages, virtual = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
    if virtual is None:
        return stages
    return 2 * (stages - 1) + (virtual - 1) * stages + 1


def last_stage_share(model: ModelConfig) -> float:
    """Passes in flight on the last stage over those on the first."""
    stages, virtual = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size or 1
    return ((virtual - 1) * stages + 1) / chunks_in_flight(model)


def logprob_chunk(model: ModelConfig, architecture: Architecture) -> int:
    """Predicting positions whose logits exist at a time.

    Unless it is set, the largest power of two (at least 256, at most 8,192) whose float32 logits, of this rank's part
    of the vocabulary, take half a GiB: 4,096 positions of Llama 3's vocabulary on four ranks, 1,024 on one.
    """
    if model.logprob_chunk_tokens is not None:
        return model.logprob_chunk_tokens
    fitting = max(LOGIT_BYTES / (4 * vocabulary_rows(model, architecture)), 1)
    return min(max(int(2 ** math.floor(math.log2(fitting))), 256), 8192)


def estimate_memory(layout: ParallelLayout) -> MemoryEstimate:
    """Memory of the busiest rank."""
    config, architecture = layout.config, layout.architecture
    parameters = stage_parameters(architecture, config)
    frozen = parameters if config.model.peft.name is not None else 0.0
    trained = adapter_parameters(architecture, config) if frozen else parameters
    if config.model.fsdp:
        return _fully_sharded(layout, parameters, frozen, trained)
    size = number_bytes(config)
    weights = (frozen + trained) * size
    optimizer = ((4.0 if size == 2 else 0.0) + moment_bytes(config)) * trained
    if config.optim.cpu_offload:
        optimizer = 0.0  # on the host
    if config.optim.use_distributed_optimizer:
        part = trained_experts_part(architecture, config)
        optimizer *= (1 - part) / max(layout.replicas, 1) + part / max(layout.expert_replicas, 1)
    if config.model.fp8 is not None:
        # Layers keep their weights in FP8 besides, in rows and in columns, until the optimizer's step.
        ends = 1 if config.model.pipeline_model_parallel_size > 1 or architecture.tie_word_embeddings else 2
        weights += 2 * (parameters - ends * vocabulary_rows(config.model, architecture) * architecture.hidden_size)
    # Beside the logits there is room that autograd asks for beside the output matrix.
    matrix = vocabulary_rows(config.model, architecture) * architecture.hidden_size
    logits = chunk_of_logits(layout) + (0.0 if frozen else size * matrix)
    activations = activation_bytes(architecture, config, longest_row(config, gpu=True))
    if config.model.pipeline_model_parallel_size > 1:
        # The first stage holds the most micro-batches, the last one fewer and the logits.
        last = activations * last_stage_share(config.model)
        activations, logits = max((activations, 0.0), (last, logits), key=sum)
    return MemoryEstimate(
        parameters=weights,
        gradients=trained * 4,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        # Without its adapters the policy is its own reference.
        reference=weights if config.model.reference_in_memory and not frozen else 0.0,
    )


def _fully_sharded(layout: ParallelLayout, parameters: float, frozen: float, trained: float) -> MemoryEstimate:
    """Memory where data- and context-parallel ranks share weights, gradients and optimizer state."""
    config, architecture, ranks = layout.config, layout.architecture, max(layout.replicas, 1)
    size, logits = number_bytes(config), chunk_of_logits(layout)
    matrix = vocabulary_rows(config.model, architecture) * architecture.hidden_size
    ends = 1 if architecture.tie_word_embeddings else 2
    layer = (parameters - ends * matrix) / architecture.num_layers
    if frozen:
        # The output matrix all the time; in backward a layer and the one before it.
        gathered, end = size * matrix + max(0.0, 2 * size * layer - logits), 0.0
    else:
        # The output matrix and its gradient: the head's sum in float32, then once more in the weights' dtype, when one
        # of the two copies of the logits is free. Or both, a layer with its gradient, and the layer before it.
        cast = 0.0 if size == 4 else max(0.0, size * matrix - (logits - size * logit_numbers(layout)))
        head = (size + 4) * matrix + cast
        gathered = max(head, 2 * size * matrix + 3 * size * layer - logits)
        # The ends of the model are shared out last: gradients, their float32 form, what this rank gets of it; and the
        # embedding itself, which torch gathers for its backward.
        end = (size * (2 * ends - 1) + 4 + 4 / ranks) * matrix
    return MemoryEstimate(
        parameters=(frozen * size + trained * 4) / ranks,
        gradients=trained * 4 / ranks,
        optimizer=moment_bytes(config) * trained / ranks,
        activations=activation_bytes(architecture, config, longest_row(config, gpu=True)),
        logits=logits,
        reference=parameters * size / ranks if config.model.reference_in_memory and not frozen else 0.0,
        step=end,
        gathered=gathered,
    )


def number_bytes(config: Config) -> int:
    """Of a weight or activation."""
    return 2 if config.trainer.precision == "bf16" else 4


def moment_bytes(config: Config) -> float:
    """Of a parameter's two moments."""
    return 4.0 if config.optim.moments_dtype == "bf16" else 8.0


def vocabulary_rows(model: ModelConfig, architecture: Architecture) -> float:
    """Rows of the output matrix on a rank."""
    tensor = model.tensor_model_parallel_size
    return architecture.padded_vocab_size(model.make_vocab_size_divisible_by, tensor) / tensor


def logit_numbers(layout: ParallelLayout) -> float:
    """Logits that exist at a time."""
    config = layout.config
    positions = longest_row(config, gpu=True) / config.model.context_parallel_size
    chunk = min(logprob_chunk(config.model, layout.architecture), positions)
    return chunk * vocabulary_rows(config.model, layout.architecture)


def chunk_of_logits(layout: ParallelLayout) -> float:
    """Bytes of float32 logits and of their gradient in the run's dtype, which is in place for float32."""
    return (4 + number_bytes(layout.config) % 4) * logit_numbers(layout)
