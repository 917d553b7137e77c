"""Which projections low-rank adapters can sit on: PEFT's names, and NeMo's for the fused layers. Imports nothing."""

from __future__ import annotations

from collections.abc import Sequence

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


def projections_of(targets: Sequence[str]) -> tuple[str, ...]:
    """The projections that `model.peft.target_modules` names, in the order of :data:`PROJECTIONS`.

    `all-linear` is PEFT's word for all of them. Unknown names are left out; the rules refuse them before.
    """
    wanted = {projection for name in targets for projection in LINEARS.get(name, (name,))}
    return tuple(name for name in PROJECTIONS if name in wanted or "all-linear" in targets)


def hf_module(layer: int, projection: str) -> str:
    """The projection's module in a Hugging Face Llama, Mistral or Qwen; ``layer`` counts from 0."""
    block = "self_attn" if projection in ATTENTION else "mlp"
    return f"model.layers.{layer}.{block}.{projection}"
