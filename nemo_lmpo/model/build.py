"""Builds megatron-core GPT models from an architecture and a layout."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from nemo_lmpo.config.schema import ModelConfig, TrainerConfig
from nemo_lmpo.formats.architecture import Architecture
from nemo_lmpo.model.attention import PackedAttention, PackedSDPA
from nemo_lmpo.model.flash_attention import PackedFlashAttention
from nemo_lmpo.model.kernels import Kernels
from nemo_lmpo.model.mixture import expert_fields, mark_experts, routers_of, use_balanced_routers
from nemo_lmpo.model.norm import RecomputedRMSNorm, RMSNorm
from nemo_lmpo.model.packed_gpt import PackedGPTModel
from nemo_lmpo.model.te_attention import PackedTEAttention
from nemo_lmpo.parallel.groups import ParallelGroups

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig


def parameter_dtype(trainer: TrainerConfig) -> torch.dtype:
    """Dtype of weights and activations for `trainer.precision`."""
    return torch.bfloat16 if trainer.precision == "bf16" else torch.float32


_PARALLEL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "context_parallel_size",
    "sequence_parallel",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "tp_comm_overlap",
)
"""Settings of the layout, which megatron-core's configuration has under the same names."""


FP8: dict[str, dict[str, Any]] = {
    "hybrid": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "tensorwise": {"fp8": "e4m3", "fp8_recipe": "tensorwise"},
    "blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
}
"""megatron-core's format and recipe of `model.fp8`. None of them keeps a history of scales, so that checkpoints hold no
more than in BF16 and a resumed run goes on as it was; the recipe that has one, delayed scaling, is left out."""


def transformer_config(
    architecture: Architecture, model: ModelConfig, *, dtype: torch.dtype, kernels: Kernels
) -> TransformerConfig:
    """megatron-core's configuration of the decoder for this layout."""
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import TransformerConfig

    interleaved = model.virtual_pipeline_model_parallel_size is not None
    recomputed = model.activations_checkpoint_granularity == "full"
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.rms_norm_eps,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=architecture.family.qkv_bias,
        qk_layernorm=architecture.family.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=architecture.initializer_range,
        window_size=(architecture.sliding_window - 1, 0) if architecture.sliding_window else None,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        **{name: getattr(model, name) for name in _PARALLEL},
        **expert_fields(architecture, kernels),
        # The micro-batches of a step have one length, so stages need not tell each other what comes.
        variable_seq_lengths=False,
        # Works around a fault of old versions of torch by waiting for the device after every transfer.
        batch_p2p_sync=False,
        # The interleaved schedule without overlap gives wrong gradients for two stages (measured).
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        recompute_granularity=model.activations_checkpoint_granularity,
        recompute_modules=list(model.recompute_modules),
        recompute_method=model.activations_checkpoint_method if recomputed else None,
        recompute_num_layers=model.activations_checkpoint_num_layers if recomputed else None,
        # The loss is divided by the step's pairs already: gradients are to be added up over ranks, not averaged.
        calculate_per_token_loss=True,
        **(FP8[model.fp8] if model.fp8 is not None else {}),
        perform_initialization=False,
        # Weights that ranks share come to the device a layer at a time; untouched memory of the host costs nothing.
        use_cpu_initialization=model.fsdp or not kernels.gpu,
        gradient_accumulation_fusion=False,
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        # Only Transformer Engine reads it, which must not fall back to a kernel with dense scores.
        attention_backend=AttnBackend[kernels.te_attention or "auto"],
        bias_activation_fusion=kernels.gpu,
        masked_softmax_fusion=False,
        bias_dropout_fusion=kernels.gpu,
        apply_rope_fusion=kernels.transformer_engine,
        deallocate_pipeline_outputs=model.pipeline_model_parallel_size > 1,
    )


def layer_spec(kernels: Kernels, *, qk_norm: bool, experts: int | None = None) -> ModuleSpec:
    """Transformer Engine's layers, or megatron-core's own with this project's norm; always packed attention."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.models.gpt.gpt_layer_specs import (
            get_gpt_layer_local_spec,
            get_gpt_layer_with_transformer_engine_spec,
        )

    if kernels.transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(experts, moe_grouped_gemm=True, qk_layernorm=qk_norm)
    else:
        spec = get_gpt_layer_local_spec(experts, normalization="RMSNorm", qk_layernorm=qk_norm)
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = _local_norm(kernels)
        if qk_norm:
            attention = spec.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = _local_norm(kernels)
    spec.submodules.self_attention.submodules.core_attention = attention_module(kernels)
    if experts is not None:
        use_balanced_routers(spec)
    return spec


def _local_norm(kernels: Kernels) -> type[RMSNorm]:
    return RMSNorm if kernels.gpu else RecomputedRMSNorm


def attention_module(kernels: Kernels) -> type[PackedAttention]:
    """The class of core attention."""
    return {"sdpa": PackedSDPA, "flash": PackedFlashAttention, "te": PackedTEAttention}[kernels.attention]


def block_spec(kernels: Kernels, config: TransformerConfig, vp_stage: int | None) -> Any:
    """The decoder block's spec: the layers of this stage and the final norm."""
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    layer = layer_spec(kernels, qk_norm=config.qk_layernorm, experts=config.num_moe_experts)
    if kernels.transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        final_norm = TENorm
    else:
        final_norm = _local_norm(kernels)
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=final_norm)


def build_model_chunks(
    architecture: Architecture,
    model: ModelConfig,
    *,
    groups: ParallelGroups,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
) -> list[PackedGPTModel]:
    """This process's chunks of the model, weights uninitialised: one, or one a virtual pipeline stage."""
    config = transformer_config(architecture, model, dtype=dtype, kernels=kernels)
    stages = model.virtual_pipeline_model_parallel_size
    chunks = []
    for vp_stage in range(stages or 1):
        stage = vp_stage if stages is not None else None
        first, last = vp_stage == 0, vp_stage == (stages or 1) - 1
        chunk = PackedGPTModel(
            replace(config) if vp_stage else config,
            block_spec(kernels, config, stage),
            architecture=architecture,
            padded_vocab_size=architecture.padded_vocab_size(
                model.make_vocab_size_divisible_by, model.tensor_model_parallel_size
            ),
            pre_process=first and groups.pipeline.rank() == 0,
            post_process=last and groups.is_last_stage,
            vp_stage=stage,
        )
        mark_tensor_parallel(chunk)
        mark_experts(chunk)
        if model.moe_freeze_router:
            for _, router in routers_of([chunk]):
                router.requires_grad_(False)
        chunks.append(chunk.to(dtype) if model.fsdp else chunk.to(dtype).to(device))
    return chunks


def mark_tensor_parallel(chunk: torch.nn.Module) -> None:
    """Mark the weights that are split over the tensor-parallel group.

    megatron-core does this while it initialises weights, which is skipped here because they are loaded. Without
    the mark every rank but the first would leave its part out of the gradient norm.
    """
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        set_tensor_model_parallel_attributes,
    )

    split_dimension = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in chunk.modules():
        dimension = split_dimension.get(type(module))
        weight = getattr(module, "weight", None)
        if dimension is not None and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, True, dimension, 1)
