"""What a decoder looks like, read from a Hugging Face `config.json`; the one description all parts share."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_lmpo.errors import CheckpointError, ConfigError

SUPPORTED_MODEL_TYPES = ("llama", "mistral")


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
class Architecture:
    """A Llama or Mistral decoder: pre-norm RMSNorm, SwiGLU, grouped-query attention, rotary embedding."""

    model_type: str
    vocab_size: int
    """Rows of the embedding as stored, without padding for tensor parallelism."""
    hidden_size: int
    ffn_hidden_size: int
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

    def padded_vocab_size(self, divisible_by: int, tensor_parallel_size: int) -> int:
        """Vocabulary rounded up to a multiple of ``divisible_by * tensor_parallel_size``."""
        multiple = divisible_by * tensor_parallel_size
        return math.ceil(self.vocab_size / multiple) * multiple

    def num_parameters(self) -> int:
        """Parameters of the unpadded model, tied embeddings counted once."""
        query = self.num_attention_heads * self.head_dim
        key_value = 2 * self.num_query_groups * self.head_dim
        attention = self.hidden_size * (query + key_value) + query * self.hidden_size
        mlp = 3 * self.hidden_size * self.ffn_hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + mlp + 2 * self.hidden_size) + self.hidden_size + embeddings


def _rope(config: Mapping[str, Any], origin: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling; transformers 5 keeps both in `rope_parameters`, older ones in two fields."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise CheckpointError(f"{origin}: partial_rotary_factor={partial!r} is not supported (only 1.0)")
    theta = float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "llama3":
        return theta, RopeScaling(
            kind="llama3",
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_position_embeddings=int(parameters["original_max_position_embeddings"]),
        )
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=float(parameters["factor"]))
    raise CheckpointError(f"{origin}: rope_type '{kind}' is not supported; supported: default, linear, llama3")


def _refuse_unsupported(config: Mapping[str, Any], origin: str) -> str:
    model_type = str(config.get("model_type"))
    if model_type not in SUPPORTED_MODEL_TYPES:
        near = difflib.get_close_matches(model_type, SUPPORTED_MODEL_TYPES, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise CheckpointError(
            f"{origin}: model_type '{model_type}' is not supported; supported: {', '.join(SUPPORTED_MODEL_TYPES)}{hint}"
        )
    for name, expected in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if config.get(name, expected) != expected:
            raise CheckpointError(f"{origin}: {name}={config[name]!r} is not supported (only {expected!r})")
    return model_type


def architecture_from_hf(config: Mapping[str, Any], origin: str = "config.json") -> Architecture:
    """Read a Hugging Face config; ``origin`` names it in errors. Absent fields mean what they mean in transformers.

    Raises:
        CheckpointError: another family, an unsupported variant, a missing field, or a value that is none.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{origin} holds a {type(config).__name__} instead of named fields; restore the file")
    model_type = _refuse_unsupported(config, origin)
    heads = _size(config, "num_attention_heads", origin)
    hidden = _size(config, "hidden_size", origin)
    try:
        theta, scaling = _rope(config, origin)
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{origin}: the field {error.args[0]} of the rotary embedding is missing") from None
    except (TypeError, ValueError, AttributeError):
        given = {name: config[name] for name in ("rope_parameters", "rope_scaling", "rope_theta") if name in config}
        raise CheckpointError(f"{origin}: {given} does not describe a rotary embedding; correct it") from None
    mistral = model_type == "mistral"
    return Architecture(
        model_type=model_type,
        vocab_size=_size(config, "vocab_size", origin),
        hidden_size=hidden,
        ffn_hidden_size=_size(config, "intermediate_size", origin),
        num_layers=_size(config, "num_hidden_layers", origin),
        num_attention_heads=heads,
        num_query_groups=_size(config, "num_key_value_heads", origin, absent=8 if mistral else heads, null=heads),
        head_dim=_size(config, "head_dim", origin, absent=hidden // heads, null=hidden // heads),
        max_position_embeddings=_size(config, "max_position_embeddings", origin, absent=131072 if mistral else 2048),
        rms_norm_eps=_number(config, "rms_norm_eps", origin, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        # transformers gives no other family's attention a window, whatever the config says.
        sliding_window=(_size(config, "sliding_window", origin, absent=4096, null=0) or None) if mistral else None,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        initializer_range=_number(config, "initializer_range", origin, 0.02),
    )


def _size(
    config: Mapping[str, Any], name: str, origin: str, *, absent: int | None = None, null: int | None = None
) -> int:
    """A whole number of at least 1; ``absent`` and ``null`` stand in for a field that is not there, or is null."""
    if name not in config:
        if absent is None:
            raise CheckpointError(f"{origin}: the field {name} is missing; add it")
        return absent
    value = config[name]
    if value is None and null is not None:
        return null
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{origin}: {name}={value!r} is not a whole number of at least 1; correct it")
    return value


def _number(config: Mapping[str, Any], name: str, origin: str, absent: float) -> float:
    value = config.get(name, absent)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"{origin}: {name}={value!r} is not a number above 0; correct it")
    return float(value)


def read_architecture(directory: Path) -> Architecture:
    """The architecture of a Hugging Face directory.

    Raises:
        CheckpointError: no readable `config.json`, or one that is not supported.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; give a Hugging Face model directory") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); restore the file") from None
    return architecture_from_hf(config, origin=str(path))


def check_architecture(architecture: Architecture) -> None:
    """Refuse sizes that no layout could run.

    Raises:
        ConfigError: heads that do not divide into query groups, or a size below 1.
    """
    if architecture.num_attention_heads % architecture.num_query_groups:
        raise ConfigError(
            f"num_attention_heads={architecture.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={architecture.num_query_groups}; fix the model's config"
        )


def architecture_to_hf(architecture: Architecture) -> dict[str, Any]:
    """A Hugging Face config of the architecture, the inverse of :func:`architecture_from_hf`.

    Token ids and dtype are not part of an architecture; the caller adds them.
    """
    a = architecture
    config: dict[str, Any] = {
        "architectures": [{"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[a.model_type]],
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
    }
    if a.model_type == "llama":
        config.update(attention_bias=False, mlp_bias=False)
    else:
        config.update(sliding_window=a.sliding_window)
    return config


def _rope_scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }
