"""What a decoder looks like, read from a Hugging Face `config.json`; the one description all parts share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_lmpo.errors import CheckpointError, ConfigError, shown
from nemo_lmpo.formats.families import FAMILIES, ExpertNames, Family, family_name
from nemo_lmpo.formats.fields import Fields
from nemo_lmpo.formats.window import window_from_hf, window_to_hf

MOST_LAYERS = 10_000
"""More than any model has; a larger number is a damaged config, and would take hours to count through."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1 frequency scaling of the rotary embedding, or linear position interpolation.

    For ``kind == "linear"`` only ``factor`` has a meaning.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class Experts:
    """What stands in place of each layer's MLP in a mixture: a router, and MLPs of which it chooses a few a token."""

    number: int
    per_token: int
    ffn_hidden_size: int
    """Inner size of one expert."""
    normalized: bool = True
    """Whether the weights of a token's experts sum to one, or are their parts of the softmax over all experts."""


@dataclass(frozen=True)
class Architecture:
    """A pre-norm decoder with RMSNorm, SwiGLU, grouped-query attention and rotary embedding."""

    model_type: str
    """A key of :data:`nemo_lmpo.formats.families.FAMILIES`."""
    vocab_size: int
    """Rows of the embedding as stored, without padding for tensor parallelism."""
    hidden_size: int
    ffn_hidden_size: int
    """Inner size of the MLP; a mixture's config has one, too, and :attr:`mlp_size` is what an expert has."""
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    """Each token attends to this many newest positions, itself included; None: to all."""
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    experts: Experts | None = None
    """Of a mixture of experts; None: every layer has one MLP."""

    @property
    def mlp_size(self) -> int:
        """Inner size of an MLP: of the one in each layer, or of each expert."""
        return self.ffn_hidden_size if self.experts is None else self.experts.ffn_hidden_size

    @property
    def family(self) -> Family:
        """What the model's family has beside the sizes."""
        return FAMILIES[self.model_type]

    def padded_vocab_size(self, divisible_by: int, tensor_parallel_size: int) -> int:
        """Vocabulary rounded up to a multiple of ``divisible_by * tensor_parallel_size``."""
        multiple = divisible_by * tensor_parallel_size
        return math.ceil(self.vocab_size / multiple) * multiple

    def num_parameters(self) -> int:
        """Parameters of the unpadded model, tied embeddings counted once."""
        return self._parameters(1 if self.experts is None else self.experts.number)

    def num_active_parameters(self) -> int:
        """Parameters that a token meets: of a mixture's experts, as many as are chosen for it."""
        return self._parameters(1 if self.experts is None else self.experts.per_token)

    def num_expert_parameters(self) -> int:
        """Parameters of all experts of a mixture, without its routers; 0 where there are none."""
        if self.experts is None:
            return 0
        return self.num_layers * self.experts.number * 3 * self.hidden_size * self.mlp_size

    def _parameters(self, mlps: int) -> int:
        """With so many MLPs in a layer."""
        query = self.num_attention_heads * self.head_dim
        key_value = 2 * self.num_query_groups * self.head_dim
        attention = self.hidden_size * (query + key_value) + query * self.hidden_size
        attention += (query + key_value) * self.family.qkv_bias + 2 * self.head_dim * self.family.qk_norm
        mlp = mlps * 3 * self.hidden_size * self.mlp_size
        if self.experts is not None:
            mlp += self.experts.number * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + mlp + 2 * self.hidden_size) + self.hidden_size + embeddings


def architecture_from_hf(config: Mapping[str, Any], origin: str = "config.json") -> Architecture:
    """Read a Hugging Face config; ``origin`` names it in errors. Absent fields mean what they mean in transformers.

    Raises:
        CheckpointError: another family, an unsupported variant, a missing field, or an invalid value.
    """
    fields = Fields(config, origin)
    model_type = family_name(fields)
    family = FAMILIES[model_type]
    biases: dict[str, tuple[Any, ...]] = dict.fromkeys(family.biases, (False, None))
    fields.require(_REQUIRED | biases, f"{model_type} models here")
    heads = fields.size("num_attention_heads")
    hidden = fields.size("hidden_size")
    absent = {"num_key_value_heads": heads, "max_position_embeddings": 2048, "head_dim": hidden // heads}
    absent.update(family.absent)
    layers = fields.size("num_hidden_layers", most=MOST_LAYERS)
    theta, scaling = _rope(fields, family.rope_theta)
    return Architecture(
        model_type=model_type,
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden,
        ffn_hidden_size=fields.size("intermediate_size"),
        experts=_experts(fields, family.experts),
        num_layers=layers,
        num_attention_heads=heads,
        num_query_groups=fields.size("num_key_value_heads", absent=absent["num_key_value_heads"], null=heads),
        head_dim=even_head_dim(fields.size("head_dim", absent=absent["head_dim"], null=hidden // heads), origin),
        max_position_embeddings=fields.size("max_position_embeddings", absent=absent["max_position_embeddings"]),
        rms_norm_eps=fields.number("rms_norm_eps", family.rms_norm_eps),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=window_from_hf(fields, family.window, family.absent.get("sliding_window", 0), layers),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        initializer_range=start_deviation(fields, "initializer_range"),
    )


_REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "is_causal": (True,),
    "per_layer_config": (None, {}),
    "transformers_weights": (None, "model.safetensors"),
}
"""Fields of any family that transformers computes something else by, and what they may be."""


_REQUIRED_OF_MIXTURES: dict[str, tuple[Any, ...]] = {
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "router_jitter_noise": (0.0, None),
    "shared_expert_intermediate_size": (None, 0),
    "n_shared_experts": (None, 0),
    "scoring_func": ("softmax", None),
    "quantization_config": (None,),
}
"""Every layer is a mixture, a softmax over one router's logits chooses its experts, and their weights are numbers."""


def _experts(fields: Fields, names: ExpertNames | None) -> Experts | None:
    """The experts of a mixture's config.

    Raises:
        CheckpointError: layers without experts, shared or quantized ones, another router, or an invalid value.
    """
    if names is None:
        return None
    fields.require(_REQUIRED_OF_MIXTURES, "a softmax router in every layer, and experts that all are chosen among")
    number = names.number if names.number in fields.values else "num_local_experts"
    experts = fields.size(number, absent=names.absent[names.number], least=2)
    chosen = fields.size("num_experts_per_tok", absent=names.absent["num_experts_per_tok"])
    if chosen > experts:
        raise fields.error("num_experts_per_tok", f"is more than the {experts} experts that there are; correct it")
    normalized = names.normalized is None or fields.flag(names.normalized)
    if chosen == 1 and normalized:
        raise fields.error("num_experts_per_tok", "makes every weight 1, so that no router could learn; correct it")
    return Experts(experts, chosen, fields.size(names.width, absent=names.absent[names.width]), normalized)


def start_deviation(fields: Fields, name: str) -> float:
    """The standard deviation of start weights.

    Raises:
        CheckpointError: it is not a number from 0 to 1.
    """
    value = fields.number(name, 0.02, zero=True)
    if value > 1:
        raise fields.error(name, "is not a standard deviation between 0 and 1; correct it")
    return value


def even_head_dim(head_dim: int, origin: str) -> int:
    """``head_dim``, which the rotary embedding halves.

    Raises:
        CheckpointError: it is odd, or less than 2.
    """
    if head_dim < 2 or head_dim % 2:
        raise CheckpointError(
            f"{origin}: a head has {head_dim} channels, which a rotary embedding cannot halve; correct head_dim, "
            "hidden_size or num_attention_heads"
        )
    return head_dim


def _rope(fields: Fields, usual: float) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from where transformers takes them; ``usual`` is the family's base.

    Version 5 writes `rope_parameters`, older ones `rope_scaling` beside `rope_theta`. The older field wins where both
    say something, and what the one that counts does not say is looked for at the top.
    """
    name = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    given = fields.values.get(name) or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise fields.error(name, "does not describe one rotary embedding of all layers; correct it")
    older = {name: fields.values[name] for name in ("rope_theta", "partial_rotary_factor") if name in fields.values}
    rope = Fields({**older, **given}, f"{fields.origin}: {name}")
    rope.require({"partial_rotary_factor": (1.0, None)}, "the whole head is rotated")
    theta = rope.number("rope_theta", usual)
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=rope.number("factor"))
    if kind == "llama3":
        original = "original_max_position_embeddings"
        # The one at the top wins over the one inside; without either, the model's whole context counts.
        places = ((fields, original), (rope, original), (fields, "max_position_embeddings"))
        counts = next((place.values[name] for place, name in places if name in place.values), None)
        return theta, llama3_scaling(Fields({**rope.values, original: counts}, rope.origin), "factor", original)
    raise CheckpointError(
        f"{fields.origin}: rope_type {shown(kind)} is not supported; supported: default, linear, llama3"
    )


def llama3_scaling(fields: Fields, factor: str, original: str, defaults: RopeScaling | None = None) -> RopeScaling:
    """Llama 3.1's scaling; ``factor`` and ``original`` name the fields that files call differently.

    Raises:
        CheckpointError: a value is none, or missing where there are no ``defaults``.
    """
    absent: dict[str, Any] = {} if defaults is None else vars(defaults)
    scaling = RopeScaling(
        kind="llama3",
        factor=fields.number(factor, absent.get("factor")),
        low_freq_factor=fields.number("low_freq_factor", absent.get("low_freq_factor")),
        high_freq_factor=fields.number("high_freq_factor", absent.get("high_freq_factor")),
        original_max_position_embeddings=fields.size(original, absent=absent.get("original_max_position_embeddings")),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise fields.error("high_freq_factor", f"is not above low_freq_factor={scaling.low_freq_factor}; correct it")
    return scaling


def read_architecture(directory: Path, name: str = "config.json") -> Architecture:
    """The architecture of a Hugging Face directory, or of another file of this form.

    Raises:
        CheckpointError: no readable file, or one that is not supported.
    """
    path = directory / name
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist as a file; give a Hugging Face model directory")
    return architecture_from_hf(parse_json(path.read_bytes(), str(path)), origin=str(path))


def parse_json(content: bytes, origin: str) -> Any:
    """What JSON text holds; ``origin`` names it in errors.

    Raises:
        CheckpointError: it is none, or nested beyond reason.
    """

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not a number there")

    try:
        return json.loads(content, parse_constant=refuse)
    # Besides JSONDecodeError: text that is not UTF-8, numbers of thousands of digits.
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise CheckpointError(f"{origin} is not valid JSON ({reason}); restore the file") from None


MOST_PARAMETERS = 10**13
"""Some ten times more than the largest models have."""


def check_architecture(architecture: Architecture) -> None:
    """Refuse sizes that no layout could run.

    Raises:
        ConfigError: heads that do not divide into query groups, or more parameters than any machine could hold.
    """
    if (parameters := architecture.num_parameters()) > MOST_PARAMETERS:
        raise ConfigError(
            f"the model's config describes {parameters:.1e} parameters (hidden_size={architecture.hidden_size}, "
            f"intermediate_size={architecture.ffn_hidden_size}, vocab_size={architecture.vocab_size}, "
            f"num_hidden_layers={architecture.num_layers}); correct it"
        )
    if architecture.num_attention_heads % architecture.num_query_groups:
        raise ConfigError(
            f"num_attention_heads={architecture.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={architecture.num_query_groups}; fix the model's config"
        )


def architecture_to_hf(architecture: Architecture) -> dict[str, Any]:
    """A Hugging Face config of the architecture, the inverse of :func:`architecture_from_hf`.

    Token ids and dtype are not part of an architecture; an export adds them.
    """
    a = architecture
    return {
        "architectures": [a.family.hf_class],
        "model_type": a.model_type,
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_hidden_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_query_groups,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": a.max_position_embeddings,
        "rms_norm_eps": a.rms_norm_eps,
        "rope_theta": a.rope_theta,
        "rope_scaling": _rope_scaling_to_hf(a.rope_scaling),
        "initializer_range": a.initializer_range,
        "tie_word_embeddings": a.tie_word_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        **dict.fromkeys(a.family.biases, False),
        **({} if a.family.window is None else window_to_hf(a.sliding_window, a.family.window)),
        **_experts_to_hf(a.experts, a.family.experts),
    }


def _experts_to_hf(experts: Experts | None, names: ExpertNames | None) -> dict[str, Any]:
    if experts is None or names is None:
        return {}
    config: dict[str, Any] = {
        names.number: experts.number,
        "num_experts_per_tok": experts.per_token,
        names.width: experts.ffn_hidden_size,
        "output_router_logits": False,
    }
    if names.normalized is not None:
        config |= {names.normalized: experts.normalized, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return config


def _rope_scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    numbers = asdict(scaling)
    return {"rope_type": numbers.pop("kind"), **numbers}
