"""Which projections low-rank adapters can sit on: PEFT's names, and NeMo's for the fused layers."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_lmpo.formats.families import ExpertNames

ADAPTERS = "lora"
"""Where a model chunk keeps its adapters, and so how their names begin."""

LINEARS: dict[str, tuple[str, ...]] = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""megatron-core's linear layers (NeMo's target names), and the Hugging Face projections that each holds."""

PROJECTIONS = tuple(name for names in LINEARS.values() for name in names)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = tuple(name for name in PROJECTIONS if name not in ATTENTION)

MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""What Mixtral calls the projections of its experts."""


def projections_of(targets: Sequence[str]) -> tuple[str, ...]:
    """The projections that `model.peft.target_modules` names, in the order of :data:`PROJECTIONS`.

    `all-linear` is PEFT's word for all of them. Unknown names are left out; the rules refuse them before.
    """
    wanted = {projection for name in targets for projection in LINEARS.get(name, (MIXTRAL.get(name, name),))}
    return tuple(name for name in PROJECTIONS if name in wanted or "all-linear" in targets)


def hf_projection(projection: str, experts: ExpertNames | None = None) -> str:
    """What Hugging Face calls a projection; ``experts``: the names of a mixture's family."""
    if experts is None or projection in ATTENTION:
        return projection
    return {"gate_proj": experts.gate, "up_proj": experts.up, "down_proj": experts.down}[projection]


def hf_module(layer: int, projection: str, experts: ExpertNames | None = None, expert: int = 0) -> str:
    """The projection's module in a Hugging Face model.

    Args:
        layer: counts from 0.
        projection: of :data:`PROJECTIONS`.
        experts: the names of a mixture's family; unset: the model is dense.
        expert: which of the layer's, from 0; attention has none.
    """
    name = hf_projection(projection, experts)
    if projection in ATTENTION:
        return f"model.layers.{layer}.self_attn.{name}"
    block = "mlp" if experts is None else f"{experts.block}.experts.{expert}"
    return f"model.layers.{layer}.{block}.{name}"
