"""The families of decoders that are supported, each as what differs from a Llama."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nemo_lmpo.errors import CheckpointError, nearest, shown
from nemo_lmpo.formats.fields import Fields


@dataclass(frozen=True)
class ExpertNames:
    """What Hugging Face calls the tensors of a mixture's layer, and the fields of its config."""

    block: str
    """The module of a layer that holds router and experts."""
    gate: str
    up: str
    down: str
    number: str
    """The config's field with the number of experts; transformers 5 writes `num_local_experts` for all."""
    width: str
    """The config's field with an expert's inner size."""
    absent: Mapping[str, int]
    """What transformers takes where the config does not say."""
    normalized: str | None = None
    """The switch that makes the chosen experts' weights sum to one; None: they always do."""


@dataclass(frozen=True)
class Family:
    """How a family of decoders differs from a Llama; the rest of the code asks for these properties only.

    A new family is an entry of :data:`FAMILIES`, its tiny model in the tests, and, where it has a tensor that no
    other has, a rule in :mod:`nemo_lmpo.formats.mapping`.
    """

    hf_class: str
    nemo2_class: str
    """The end of `_target_` in a NeMo 2 `model.yaml`."""
    qkv_bias: bool = False
    """The query, key and value projections have biases; no other projection has."""
    qk_norm: bool = False
    """RMSNorm over each head of queries and keys, before the rotary embedding."""
    biases: tuple[str, ...] = ()
    """Switches of further biases, which are not supported; transformers reads no other family's."""
    window: str | None = None
    """The switch of the sliding window; empty: `sliding_window` alone decides; None: the family has none."""
    absent: Mapping[str, int] = field(default_factory=dict)
    """What transformers puts in place of absent fields, where it is not Llama's."""
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    """These two, too, are for a config that does not say."""
    experts: ExpertNames | None = None
    """Of a mixture of experts, in every layer of which a router chooses among them; None: the MLP is one."""


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "LlamaModel", biases=("attention_bias", "mlp_bias")),
    "mistral": Family(
        "MistralForCausalLM",
        "MistralModel",
        window="",
        absent={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "Qwen2Model",
        qkv_bias=True,
        window="use_sliding_window",
        absent={"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "Qwen3Model",
        qk_norm=True,
        biases=("attention_bias",),
        window="use_sliding_window",
        absent={"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128, "sliding_window": 4096},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        "MixtralModel",
        window="",
        absent={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 0},
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        experts=ExpertNames(
            block="block_sparse_moe",
            gate="w1",
            up="w3",
            down="w2",
            number="num_local_experts",
            width="intermediate_size",
            absent={"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 14336},
        ),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "Qwen3Model",
        qk_norm=True,
        biases=("attention_bias",),
        window="use_sliding_window",
        absent={"num_key_value_heads": 4, "max_position_embeddings": 32768, "sliding_window": 4096},
        experts=ExpertNames(
            block="mlp",
            gate="gate_proj",
            up="up_proj",
            down="down_proj",
            number="num_experts",
            width="moe_intermediate_size",
            absent={"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
            normalized="norm_topk_prob",
        ),
    ),
}
"""By `model_type` of a Hugging Face config."""

_MIXTURES = {
    "qwen2_moe": "its shared experts and their gate are not computed here",
    "llama4": "its routers weigh what goes into an expert, and its attention has chunks",
    "llama4_text": "its routers weigh what goes into an expert, and its attention has chunks",
    "deepseek_v2": "its attention is latent, and its routers choose within groups",
    "deepseek_v3": "its attention is latent, and its routers choose within groups",
    "gpt_oss": "its experts are quantized and have biases, and its attention has sinks",
}
"""Mixtures that people ask for, and what they have that is not computed here."""


def family_name(fields: Fields) -> str:
    """The family of a Hugging Face config, a key of :data:`FAMILIES`.

    Raises:
        CheckpointError: it is of none; mixtures that people ask for are refused with the reason.
    """
    name = shown(fields.values.get("model_type")).strip("'")
    family = FAMILIES.get(name)
    mixture = name in _MIXTURES or name.endswith("_moe") or fields.has("num_experts") or fields.has("num_local_experts")
    if mixture and family is None:
        reason = _MIXTURES.get(name, "how it routes tokens is not known here")
        known = ", ".join(name for name, family in FAMILIES.items() if family.experts is not None)
        raise CheckpointError(
            f"{fields.origin}: model_type '{name}' is a mixture of experts that is not supported ({reason}); "
            f"supported mixtures: {known}; dense models: "
            f"{', '.join(name for name, family in FAMILIES.items() if family.experts is None)}"
        )
    if family is None:
        near = nearest(name, FAMILIES)
        # Longer names belong to other models (ministral, mistral3, llama4), and so does qwen.
        hint = f"; did you mean '{near}'?" if near and len(name) <= len(near) and near.isalpha() else ""
        raise CheckpointError(
            f"{fields.origin}: model_type '{name}' is not supported; supported: {', '.join(FAMILIES)}{hint}"
        )
    return name
