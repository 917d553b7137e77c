"""Architectures in NeMo's own words: `model_config.yaml` of `.nemo`, and `context/model.yaml` of NeMo 2."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_lmpo.errors import CheckpointError, shown
from nemo_lmpo.formats.architecture import (
    MOST_LAYERS,
    Architecture,
    RopeScaling,
    even_head_dim,
    llama3_scaling,
    start_deviation,
)
from nemo_lmpo.formats.families import FAMILIES
from nemo_lmpo.formats.fields import Fields
from nemo_lmpo.formats.nemo_experts import expert_keys, has_such, read_experts

_logger = logging.getLogger(__name__)

_NEMO_LLAMA3_SCALING = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
"""What NeMo applies when `scale_positional_embedding` is set without factors beside it."""

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
        "qkv_bias": a.family.qkv_bias,
        "qk_layernorm": a.family.qk_norm,
        **expert_keys(a.experts),
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
    # NeMo reads the factors from 2.2 on; before, it knows only the switch.
    return {
        **keys,
        "scale_positional_embedding": True,
        "scale_factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "old_context_len": scaling.original_max_position_embeddings,
    }


def nemo_applies_other_scaling(architecture: Architecture) -> bool:
    """Whether NeMo before 2.2, which reads no factors, would scale the rotary frequencies by other ones."""
    scaling = architecture.rope_scaling
    return scaling is not None and scaling.kind == "llama3" and scaling != _NEMO_LLAMA3_SCALING


def nemo_fields(config: Mapping[str, Any], origin: str) -> Fields:
    """The model's settings in a `model_config.yaml`.

    Raises:
        CheckpointError: they have no names.
    """
    return Fields(config.get("model", config), origin, text_numbers=True)


_REQUIRED: dict[str, tuple[Any, ...]] = {
    "normalization": ("rmsnorm", "RMSNorm"),
    "activation": ("fast-swiglu", "swiglu"),
    "position_embedding_type": ("rope",),
    "bias": (False,),
    "rotary_percentage": (1.0,),
    "attention_type": ("multihead",),
    "transformer_block_type": ("pre_ln",),
    "headscale": (False,),
    "openai_gelu": (False,),
    "apply_embedding_scaling": (False,),
}
_REQUIRED_EVERYWHERE: dict[str, tuple[Any, ...]] = {
    "rotary_interleaved": (False, None),
    "layernorm_zero_centered_gamma": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "multi_latent_attention": (False, None),
}
_REQUIRED_NEMO2: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "gated_linear_unit": (True,),
    "position_embedding_type": ("rope",),
    "add_bias_linear": (False,),
    "rotary_percent": (1.0,),
}
_SUPPORTED = f"as the supported families have it: {', '.join(FAMILIES)}"


def architecture_from_nemo(config: Mapping[str, Any], vocab_size: int, origin: str) -> Architecture:
    """Read the `model_config.yaml` of a `.nemo` file; it does not hold the vocabulary's size.

    Raises:
        CheckpointError: another model than the families here, a missing field, or an invalid value.
    """
    model = nemo_fields(config, origin)
    model.require(_REQUIRED | _REQUIRED_EVERYWHERE, _SUPPORTED)
    window = _window(model)
    bias, norm = model.flag("qkv_bias"), model.flag("qk_layernorm")
    experts = read_experts(model, model.size("ffn_hidden_size"))
    fitting = [
        name
        for name, family in FAMILIES.items()
        if (family.qkv_bias, family.qk_norm) == (bias, norm) and (window is None or family.window is not None)
        if has_such(family, experts)
    ]
    if not fitting:
        raise CheckpointError(
            f"{origin}: no supported family has qkv_bias={bias}, qk_layernorm={norm} and window_size="
            f"{shown(model.values.get('window_size'))}"
            + (
                ""
                if experts is None
                else f", num_moe_experts={experts.number}, moe_router_pre_softmax={not experts.normalized}"
            )
            + f"; supported: {', '.join(FAMILIES)}"
        )
    positions = model.size("max_position_embeddings")
    scaling = _linear_scaling(model)
    if model.flag("scale_positional_embedding"):
        scaling = _meant_scaling(model, positions, origin)
    return _architecture(model, fitting[0], vocab_size, scaling, positions)


def _meant_scaling(model: Fields, positions: int, origin: str) -> RopeScaling | None:
    """What `scale_positional_embedding: true` stands for: NVIDIA's Llama converter sets it for every Llama.

    Scaling stretches 8192 positions, so a model with no more than those was not trained with it.
    """
    scaling = _scaling(model)
    if model.has("scale_factor"):
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
        CheckpointError: another model than the families here, a missing field, or an invalid value.
    """
    target = str(config.get("_target_", ""))[:80]
    model = Fields(config.get("config"), f"{origin}: config", text_numbers=True)
    mixture = model.values.get("num_moe_experts") not in (None, 0, 1)
    # NeMo 2 has one class for dense and mixed Qwen3.
    by_class = {
        family.nemo2_class: name for name, family in FAMILIES.items() if (family.experts is not None) == mixture
    }
    model_type = by_class.get(target.rpartition(".")[2])
    if model_type is None:
        raise CheckpointError(
            f"{origin}: the model '{target}' {'with experts ' if mixture else ''}is not supported; supported: "
            f"{', '.join(by_class)}"
        )
    family = FAMILIES[model_type]
    traits = {"add_qkv_bias": (family.qkv_bias,), "qk_layernorm": (family.qk_norm,)}
    model.require(_REQUIRED_NEMO2 | _REQUIRED_EVERYWHERE | traits, _SUPPORTED)
    activation = model.values.get("activation_func")
    name = activation.get("_target_") if isinstance(activation, Mapping) else activation
    if name is not None and not str(name).endswith("silu"):
        raise model.error("activation_func", f"is not supported (only silu: {_SUPPORTED})")
    positions = model.size("seq_length")
    scaling = _linear_scaling(model)
    if model.has("scale_factor"):
        scaling = _scaling(model)
        _logger.warning(
            "%s: NeMo 2 keeps the factor of a model's rotary scaling only; %d original positions are assumed (give the "
            "model's Hugging Face config with --config if it has others)",
            origin,
            scaling.original_max_position_embeddings,
        )
    if _window(model) is not None:
        if family.window is None:
            raise model.error("window_size", f"is not supported for a {model_type}; correct it")
        _logger.warning(
            "%s: NeMo 2 keeps a model's window in place of its positions; max_position_embeddings becomes %d (give the "
            "model's Hugging Face config with --config if it has more)",
            origin,
            positions,
        )
    read = _architecture(
        model, model_type, model.size("vocab_size", absent=vocab_size, null=vocab_size), scaling, positions
    )
    if read.experts is None or has_such(family, read.experts):
        return read
    # NeMo 2's own config of Mixtral, and what its importer makes of a Hugging Face one.
    _logger.warning(
        "%s: moe_router_pre_softmax is set, by which the weights of a token's experts would not sum to one; they do in "
        "a %s, and are taken so",
        origin,
        model_type,
    )
    return replace(read, experts=replace(read.experts, normalized=True))


def _scaling(model: Fields) -> RopeScaling:
    return llama3_scaling(model, "scale_factor", "old_context_len", _NEMO_LLAMA3_SCALING)


def _linear_scaling(model: Fields) -> RopeScaling | None:
    name = "seq_len_interpolation_factor"
    return RopeScaling("linear", model.number(name)) if model.has(name) else None


def _window(model: Fields) -> int | None:
    window = model.values.get("window_size")
    if window is None:
        return None
    if isinstance(window, list | tuple) and [type(side) for side in window] == [int, int]:
        past, future = window
        if past >= 1 and future == 0:
            return int(past)
    raise model.error("window_size", "is not a window over past positions such as [4096, 0]; correct it")


def _architecture(
    model: Fields, model_type: str, vocab_size: int, scaling: RopeScaling | None, positions: int
) -> Architecture:
    heads, hidden, ffn = (model.size(name) for name in ("num_attention_heads", "hidden_size", "ffn_hidden_size"))
    head_dim = model.size("kv_channels", absent=hidden // heads, null=hidden // heads)
    return Architecture(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        experts=read_experts(model, ffn),
        num_layers=model.size("num_layers", most=MOST_LAYERS),
        num_attention_heads=heads,
        num_query_groups=model.size("num_query_groups", absent=heads, null=heads),
        head_dim=even_head_dim(head_dim, model.origin),
        max_position_embeddings=positions,
        rms_norm_eps=model.number("layernorm_epsilon"),
        rope_theta=model.number("rotary_base", 10000.0),
        rope_scaling=scaling,
        sliding_window=_window(model),
        tie_word_embeddings=model.flag("share_embeddings_and_output_weights"),
        initializer_range=start_deviation(model, "init_method_std"),
    )
