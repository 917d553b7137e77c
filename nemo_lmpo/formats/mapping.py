"""Which Hugging Face tensors make up which Megatron parameter, and how tensor parallelism cuts it.

Megatron keeps the query, key and value projections in one matrix, interleaved per key-value group
(``q heads of the group, k, v``), and the MLP's gate above its up projection. Nothing else is permuted: both
sides use the same rotary convention. Layer norms carry the names of the fused Transformer Engine modules,
which is also how ``sharded_state_dict`` writes them whatever the layer spec is. A mixture's norm before its router is
fused with nothing and has a name of its own; its experts are stacked on a second axis behind the layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from nemo_lmpo.errors import ConfigError
from nemo_lmpo.formats.architecture import Architecture
from nemo_lmpo.formats.families import ExpertNames

LAYERS = "decoder.layers."
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
HF_EMBEDDING = "model.embed_tokens.weight"
HF_OUTPUT = "lm_head.weight"

EXPERTS = "mlp.experts.experts."
"""What a distributed checkpoint calls the experts of a layer, of whatever class megatron-core computes them by."""

LOCAL_SPEC_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Parameters of megatron-core's local layer spec, and the fused name of the same tensor in a dense model."""


class TensorLayout(Enum):
    """How the parts of a parameter lie in it, and which of its rows or columns a tensor-parallel rank holds."""

    WHOLE = "replicated"
    ROUTER = "replicated rows, one an expert"
    VOCABULARY = "rows, padded"
    QKV = "q, k, v per key-value group"
    GATE_UP = "gate above up, each by rows"
    COLUMNS = "columns"


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter and the Hugging Face tensors it is made of.

    ``megatron`` is the name without a layer number (the key of a distributed checkpoint, where layers are
    stacked on axis 0, and experts on axis 1); ``hf`` are templates with ``{layer}`` and ``{expert}``.
    """

    megatron: str
    hf: tuple[str, ...]
    layout: TensorLayout
    only: str | None = None
    """The property of a family without which the parameter does not exist."""

    @property
    def per_layer(self) -> bool:
        """Whether every decoder layer has this parameter."""
        return self.megatron.startswith(LAYERS)

    @property
    def per_expert(self) -> bool:
        """Whether every expert of a layer has this parameter."""
        return self.megatron.startswith(LAYERS + EXPERTS)

    def hf_names(self, place: Place | None = None) -> tuple[str, ...]:
        """Hugging Face names at a place; unset: of the first layer and expert."""
        at = place or Place()
        return tuple(name.format(layer=at.layer, expert=at.expert) for name in self.hf)

    def index(self, place: Place) -> tuple[int, ...]:
        """Where a place lies on the leading axes of the stored parameter (:func:`stacked`)."""
        return (place.layer, place.expert)[: self.per_layer + self.per_expert]


@dataclass(frozen=True)
class Place:
    """Which of a parameter's copies; both numbers count from 0 over the whole model."""

    layer: int = 0
    expert: int = 0


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION_RULES = (
    ("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight",), TensorLayout.WHOLE, None),
    ("self_attention.linear_qkv.weight", tuple(f"{part}.weight" for part in _QKV), TensorLayout.QKV, None),
    ("self_attention.linear_qkv.bias", tuple(f"{part}.bias" for part in _QKV), TensorLayout.QKV, "qkv_bias"),
    ("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), TensorLayout.WHOLE, "qk_norm"),
    ("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), TensorLayout.WHOLE, "qk_norm"),
    ("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), TensorLayout.COLUMNS, None),
)
_MLP_RULES = (
    ("mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight",), TensorLayout.WHOLE, None),
    ("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), TensorLayout.GATE_UP, None),
    ("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), TensorLayout.COLUMNS, None),
)
ROUTER = "mlp.router.weight"
MIXTURE_NORM = "pre_mlp_layernorm.weight"


def _mixture_rules(names: ExpertNames) -> tuple[tuple[str, tuple[str, ...], TensorLayout, str | None], ...]:
    expert = f"{names.block}.experts.{{expert}}"
    return (
        (MIXTURE_NORM, ("post_attention_layernorm.weight",), TensorLayout.WHOLE, None),
        (ROUTER, (f"{names.block}.gate.weight",), TensorLayout.ROUTER, None),
        (
            f"{EXPERTS}linear_fc1.weight",
            (f"{expert}.{names.gate}.weight", f"{expert}.{names.up}.weight"),
            TensorLayout.GATE_UP,
            None,
        ),
        (f"{EXPERTS}linear_fc2.weight", (f"{expert}.{names.down}.weight",), TensorLayout.COLUMNS, None),
    )


def rules(architecture: Architecture) -> tuple[Rule, ...]:
    """All parameters of the model in forward order; a tied model has no output layer."""
    family = architecture.family
    mlp = _MLP_RULES if family.experts is None else _mixture_rules(family.experts)
    layer = (
        Rule(LAYERS + megatron, tuple(f"model.layers.{{layer}}.{name}" for name in names), layout, only)
        for megatron, names, layout, only in (*_ATTENTION_RULES, *mlp)
        if only is None or getattr(family, only)
    )
    head = () if architecture.tie_word_embeddings else (Rule(OUTPUT_LAYER, (HF_OUTPUT,), TensorLayout.VOCABULARY),)
    return (
        Rule(EMBEDDING, (HF_EMBEDDING,), TensorLayout.VOCABULARY),
        *layer,
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",), TensorLayout.WHOLE),
        *head,
    )


def part_shapes(rule: Rule, architecture: Architecture) -> tuple[tuple[int, ...], ...]:
    """Shapes of the Hugging Face tensors of ``rule``, in the order of ``rule.hf``."""
    a = architecture
    query, key = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    if rule.layout is TensorLayout.VOCABULARY:
        return ((a.vocab_size, a.hidden_size),)
    if rule.layout is TensorLayout.QKV:
        columns = () if rule.only == "qkv_bias" else (a.hidden_size,)
        return (query, *columns), (key, *columns), (key, *columns)
    if rule.layout is TensorLayout.GATE_UP:
        return ((a.mlp_size, a.hidden_size),) * 2
    if rule.layout is TensorLayout.COLUMNS:
        return ((a.hidden_size, query if "linear_proj" in rule.megatron else a.mlp_size),)
    if rule.layout is TensorLayout.ROUTER:
        assert a.experts is not None
        return ((a.experts.number, a.hidden_size),)
    return ((a.head_dim if rule.only == "qk_norm" else a.hidden_size,),)


def stacked(rule: Rule, architecture: Architecture) -> tuple[int, ...]:
    """The leading axes of a stored parameter, over which its copies are stacked: layers, then experts."""
    experts = 0 if architecture.experts is None else architecture.experts.number
    return (architecture.num_layers, experts)[: rule.per_layer + rule.per_expert]


def rules_by_place(architecture: Architecture) -> Iterator[tuple[Rule, Place]]:
    """Each rule with each layer, and each expert of it, that has it; one place for parameters outside the layers."""
    for rule in rules(architecture):
        for index in itertools.product(*map(range, stacked(rule, architecture))):
            yield rule, Place(*index)


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the model and its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for rule, place in rules_by_place(architecture):
        shapes.update(zip(rule.hf_names(place), part_shapes(rule, architecture), strict=True))
    return shapes


def megatron_shape(
    rule: Rule, architecture: Architecture, *, tp_size: int = 1, padded_vocab_size: int | None = None
) -> tuple[int, ...]:
    """Shape of one tensor-parallel rank's parameter (one layer and expert of it).

    ``padded_vocab_size`` counts the rows of all ranks together; None: no padding.

    Raises:
        ConfigError: a dimension that ``tp_size`` does not divide.
    """
    parts = part_shapes(rule, architecture)
    if rule.layout in (TensorLayout.WHOLE, TensorLayout.ROUTER):
        return parts[0]
    if rule.layout is TensorLayout.COLUMNS:
        rows, columns = parts[0]
        return rows, _divide(columns, tp_size, rule)
    if rule.layout is TensorLayout.VOCABULARY:
        return _divide(padded_vocab_size or architecture.vocab_size, tp_size, rule), architecture.hidden_size
    if rule.layout is TensorLayout.QKV:
        _divide(architecture.num_query_groups, tp_size, rule)
    return sum(_divide(shape[0], tp_size, rule) for shape in parts), *parts[0][1:]


def _divide(size: int, tp_size: int, rule: Rule) -> int:
    if size % tp_size:
        name = "expert_tensor_parallel_size" if rule.per_expert else "tensor_model_parallel_size"
        raise ConfigError(
            f"{name}={tp_size} does not divide {size} ({rule.megatron}: {rule.layout.value}); choose a divisor"
        )
    return size // tp_size


@torch.no_grad()
def fill(
    out: Tensor, rule: Rule, parts: Sequence[Tensor], architecture: Architecture, *, tp_rank: int = 0, tp_size: int = 1
) -> None:
    """Copy Hugging Face ``parts`` into ``out``, the parameter of one tensor-parallel rank (one layer of it).

    Only the elements that ``out`` holds are read, and they are cast to its dtype in the copy. Rows beyond the
    vocabulary become zero. ``out`` has the shape that :func:`megatron_shape` gives; its rows may be strided.
    """
    if rule.layout in (TensorLayout.WHOLE, TensorLayout.ROUTER):
        out.copy_(parts[0])
    elif rule.layout is TensorLayout.COLUMNS:
        out.copy_(_cut(parts[0], 1, tp_rank, tp_size))
    elif rule.layout is TensorLayout.VOCABULARY:
        first = tp_rank * out.shape[0]
        rows = parts[0][first : first + out.shape[0]]
        out[: rows.shape[0]].copy_(rows)
        out[rows.shape[0] :].zero_()
    elif rule.layout is TensorLayout.GATE_UP:
        for half, part in zip(out.chunk(2), parts, strict=True):
            half.copy_(_cut(part, 0, tp_rank, tp_size))
    else:
        for grouped, part in zip(_by_group(out, architecture), parts, strict=True):
            grouped.copy_(_cut(part, 0, tp_rank, tp_size).reshape(grouped.shape))


def _by_group(stored: Tensor, architecture: Architecture) -> tuple[Tensor, Tensor, Tensor]:
    """Views of queries ``[groups, heads, head_dim, ...]``, and of keys and values ``[groups, head_dim, ...]``."""
    heads = architecture.num_attention_heads // architecture.num_query_groups
    grouped = stored.unflatten(0, (-1, heads + 2, architecture.head_dim))
    return grouped[:, :heads], grouped[:, heads], grouped[:, heads + 1]


def _cut(part: Tensor, axis: int, tp_rank: int, tp_size: int) -> Tensor:
    size = part.shape[axis] // tp_size
    return part.narrow(axis, tp_rank * size, size)


def separate(rule: Rule, tensor: Tensor, architecture: Architecture) -> tuple[Tensor, ...]:
    """Cut a whole Megatron parameter (all tensor-parallel ranks, one layer) into its Hugging Face tensors.

    Padding rows of the vocabulary are dropped. The results are contiguous; those that need no reordering are
    views of ``tensor``.
    """
    if rule.layout is TensorLayout.VOCABULARY:
        return (tensor[: architecture.vocab_size],)
    if rule.layout is TensorLayout.GATE_UP:
        return tensor.chunk(2)
    if rule.layout is TensorLayout.QKV:
        return tuple(part.reshape(-1, *tensor.shape[1:]).contiguous() for part in _by_group(tensor, architecture))
    return (tensor.contiguous(),)
