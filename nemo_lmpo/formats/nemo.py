"""Architectures in NeMo's own words: `model_config.yaml` of `.nemo`, and `context/model.yaml` of NeMo 2."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_lmpo.config.architecture import Architecture, RopeScaling
from nemo_lmpo.errors import CheckpointError

_logger = logging.getLogger(__name__)

_NEMO_LLAMA3_SCALING = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
"""What NeMo applies when `scale_positional_embedding` is set; it reads no other factors."""

_MODEL_CLASS = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
_VOCABULARY_MULTIPLE = 128


def nemo_config(architecture: Architecture, precision: str, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """The `model_config.yaml` of a `.nemo` file, with the keys of NeMo's GPT models.

    ``precision`` is `bf16`, `16` or `32`; ``tokenizer`` is the `tokenizer` section.
    """
    a = architecture
    config: dict[str, Any] = {
        "mcore_gpt": True,
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        # NeMo keeps the window of Mistral here as well.
        "encoder_seq_length": a.sliding_window or a.max_position_embeddings,
        "max_position_embeddings": a.max_position_embeddings,
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "ffn_hidden_size": a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_query_groups": a.num_query_groups,
        "kv_channels": None if a.head_dim * a.num_attention_heads == a.hidden_size else a.head_dim,
        "init_method_std": a.initializer_range,
        "use_scaled_init_method": True,
        "layernorm_epsilon": a.rms_norm_eps,
        "rotary_base": a.rope_theta,
        "make_vocab_size_divisible_by": _vocabulary_multiple(a.vocab_size),
        "share_embeddings_and_output_weights": a.tie_word_embeddings,
        "tokenizer": dict(tokenizer),
        "precision": precision if precision == "bf16" else int(precision),
        **_rope_keys(a.rope_scaling),
        **_CONSTANTS,
        "target": _MODEL_CLASS,
        "nemo_version": "2.2.1",
    }
    if a.sliding_window is not None:
        config["window_size"] = [a.sliding_window, 0]
    return config


_CONSTANTS: dict[str, Any] = {
    "normalization": "rmsnorm",
    "activation": "fast-swiglu",
    "bias": False,
    "position_embedding_type": "rope",
    "rotary_percentage": 1.0,
    "attention_type": "multihead",
    "transformer_block_type": "pre_ln",
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "ffn_dropout": 0.0,
    "pre_process": True,
    "post_process": True,
    "persist_layer_norm": True,
    "do_layer_norm_weight_decay": False,
    "apply_query_key_layer_scaling": False,
    "normalize_attention_scores": True,
    "headscale": False,
    "openai_gelu": False,
    "fp32_residual_connection": False,
    "fp16_lm_cross_entropy": False,
    "native_amp_init_scale": 4294967296,
    "native_amp_growth_interval": 1000,
    "hysteresis": 2,
    "megatron_amp_O2": True,
    "grad_allreduce_chunk_size_mb": 125,
    "grad_div_ar_fusion": True,
    "gradient_accumulation_fusion": False,
    "gradient_as_bucket_view": True,
    "bias_activation_fusion": False,
    "bias_dropout_add_fusion": False,
    "masked_softmax_fusion": True,
    "get_attention_mask_from_fusion": True,
    "apply_rope_fusion": False,
    "overlap_p2p_comm": False,
    "batch_p2p_comm": True,
    "sync_batch_comm": False,
    "sequence_parallel": False,
    "activations_checkpoint_granularity": None,
    "activations_checkpoint_method": None,
    "activations_checkpoint_num_layers": None,
    "num_micro_batches_with_partial_activation_checkpoints": None,
    "activations_checkpoint_layers_per_pipeline": None,
    "transformer_engine": True,
    "fp8": False,
    "use_cpu_initialization": False,
    "seed": 1234,
    "resume_from_checkpoint": None,
    "restore_from_path": None,
    "onnx_safe": False,
    "apex_transformer_log_level": 30,
    "use_emha": False,
    "nsys_profile": {"enabled": False, "start_step": 10, "end_step": 10, "ranks": [0], "gen_shape": False},
    "optim": {"name": "distributed_fused_adam", "lr": 1e-6, "weight_decay": 0.0, "betas": [0.9, 0.98]},
    "data": {"data_impl": "mmap", "splits_string": "900,50,50", "num_workers": 2, "dataloader_type": "single"},
}
"""What every model of these families has, and NeMo's training defaults, which its recipes override."""


def _vocabulary_multiple(vocab_size: int) -> int:
    """As NeMo does: halved until no padding is needed at tensor-parallel size 1."""
    multiple = _VOCABULARY_MULTIPLE
    while vocab_size % multiple:
        multiple //= 2
    return multiple


def _rope_keys(scaling: RopeScaling | None) -> dict[str, Any]:
    keys: dict[str, Any] = {"scale_positional_embedding": False, "seq_len_interpolation_factor": None}
    if scaling is None:
        return keys
    if scaling.kind == "linear":
        return {**keys, "seq_len_interpolation_factor": scaling.factor}
    # NeMo knows only the switch; the factors are for this project's reader.
    return {
        **keys,
        "scale_positional_embedding": True,
        "scale_factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "old_context_len": scaling.original_max_position_embeddings,
    }


def nemo_applies_other_scaling(architecture: Architecture) -> bool:
    """Whether NeMo itself would scale the rotary frequencies by other factors than the model's."""
    scaling = architecture.rope_scaling
    return scaling is not None and scaling.kind == "llama3" and scaling != _NEMO_LLAMA3_SCALING


def architecture_from_nemo(config: Mapping[str, Any], vocab_size: int, origin: str) -> Architecture:
    """Read the `model_config.yaml` of a `.nemo` file; it does not hold the vocabulary's size.

    Raises:
        CheckpointError: not a Llama or Mistral, or a field is missing.
    """
    model = config.get("model", config)
    _refuse_other_models(model, origin)
    scaling = None
    if "max_position_embeddings" not in model:
        raise CheckpointError(f"{origin}: the field max_position_embeddings is missing; add it")
    positions = int(model["max_position_embeddings"])
    if model.get("scale_positional_embedding"):
        scaling = _meant_scaling(model, positions, origin)
    elif model.get("seq_len_interpolation_factor"):
        scaling = RopeScaling("linear", float(model["seq_len_interpolation_factor"]))
    return _architecture(model, vocab_size, scaling, positions, origin)


def _meant_scaling(model: Mapping[str, Any], positions: int, origin: str) -> RopeScaling | None:
    """What `scale_positional_embedding: true` stands for: NVIDIA's Llama converter sets it for every Llama.

    Scaling stretches 8192 positions, so a model with no more than those was not trained with it.
    """
    scaling = _scaling(model)
    if "scale_factor" in model:
        return scaling
    if positions <= scaling.original_max_position_embeddings:
        _logger.warning(
            "%s: scale_positional_embedding is set, but %d positions need no scaling; it is left out "
            "(give the model's Hugging Face config with --config to decide otherwise)",
            origin,
            positions,
        )
        return None
    _logger.warning(
        "%s: scale_positional_embedding is set without factors; Llama 3.1's are taken (Llama 3.2 has others: give the "
        "model's Hugging Face config with --config)",
        origin,
    )
    return scaling


def architecture_from_nemo2(config: Mapping[str, Any], vocab_size: int, origin: str) -> Architecture:
    """Read the `context/model.yaml` of a NeMo 2 checkpoint; ``vocab_size`` stands in where it has none.

    Raises:
        CheckpointError: not a Llama or Mistral, or a field is missing.
    """
    target = str(config.get("_target_", ""))
    if not target.endswith((".LlamaModel", ".MistralModel")):
        raise CheckpointError(f"{origin}: the model '{target}' is not supported; supported: LlamaModel, MistralModel")
    model = config.get("config") or {}
    scaling = None
    if "scale_factor" in model:
        scaling = _scaling(model)
    elif model.get("seq_len_interpolation_factor"):
        scaling = RopeScaling("linear", float(model["seq_len_interpolation_factor"]))
    if "seq_length" not in model:
        raise CheckpointError(f"{origin}: the field config.seq_length is missing; add it")
    rows = int(model.get("vocab_size") or vocab_size)
    architecture = _architecture(model, rows, scaling, int(model["seq_length"]), origin)
    return replace(architecture, model_type="mistral" if target.endswith(".MistralModel") else "llama")


def _scaling(model: Mapping[str, Any]) -> RopeScaling:
    default = _NEMO_LLAMA3_SCALING
    return RopeScaling(
        "llama3",
        float(model.get("scale_factor", default.factor)),
        float(model.get("low_freq_factor", default.low_freq_factor)),
        float(model.get("high_freq_factor", default.high_freq_factor)),
        int(model.get("old_context_len", default.original_max_position_embeddings)),
    )


_REQUIRED: dict[str, tuple[Any, ...]] = {
    "normalization": ("rmsnorm", "RMSNorm"),
    "activation": ("fast-swiglu", "swiglu"),
    "position_embedding_type": ("rope",),
    "bias": (False,),
    "rotary_percentage": (1.0, 1),
}


def _refuse_other_models(model: Mapping[str, Any], origin: str) -> None:
    for name, allowed in _REQUIRED.items():
        if name in model and model[name] not in allowed:
            raise CheckpointError(
                f"{origin}: {name}={model[name]!r} is not a Llama or Mistral (these have {allowed[0]!r}), "
                "the families that are supported"
            )
    if model.get("num_moe_experts"):
        raise CheckpointError(f"{origin}: mixture-of-experts models are not supported; supported: llama, mistral")


def _architecture(
    model: Mapping[str, Any], vocab_size: int, scaling: RopeScaling | None, positions: int, origin: str
) -> Architecture:
    window = model.get("window_size")
    try:
        heads, hidden = int(model["num_attention_heads"]), int(model["hidden_size"])
        return Architecture(
            model_type="mistral" if window else "llama",
            vocab_size=vocab_size,
            hidden_size=hidden,
            ffn_hidden_size=int(model["ffn_hidden_size"]),
            num_layers=int(model["num_layers"]),
            num_attention_heads=heads,
            num_query_groups=int(model.get("num_query_groups") or heads),
            head_dim=int(model.get("kv_channels") or hidden // heads),
            max_position_embeddings=positions,
            rms_norm_eps=float(model["layernorm_epsilon"]),
            rope_theta=float(model.get("rotary_base", 10000.0)),
            rope_scaling=scaling,
            sliding_window=int(window[0]) if window else None,
            tie_word_embeddings=bool(model.get("share_embeddings_and_output_weights", False)),
            initializer_range=float(model.get("init_method_std", 0.02)),
        )
    except KeyError as error:
        raise CheckpointError(f"{origin}: the field {error.args[0]} is missing; add it") from None
