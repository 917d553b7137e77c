"""Mixtures of experts in NeMo's own words, which are megatron-core's."""

from __future__ import annotations

from typing import Any

from nemo_lmpo.formats.architecture import Experts
from nemo_lmpo.formats.families import Family
from nemo_lmpo.formats.fields import Fields


def expert_keys(experts: Experts | None) -> dict[str, Any]:
    """Of a `model_config.yaml`; none of a dense model."""
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.number,
        "moe_router_topk": experts.per_token,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "alltoall",
    }


_REQUIRED_OF_MIXTURES: dict[str, tuple[Any, ...]] = {
    "moe_router_score_function": ("softmax", None),
    "moe_shared_expert_intermediate_size": (None, 0),
    "moe_layer_freq": (1, None),
    "moe_router_num_groups": (None, 1),
    "moe_router_group_topk": (None, 1),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_router_enable_expert_bias": (False, None),
    "moe_expert_capacity_factor": (None,),
    "moe_input_jitter_eps": (None, 0.0),
    "moe_latent_size": (None,),
}
"""One softmax router in every layer, no shared experts, and no token that is dropped."""


def read_experts(model: Fields, ffn_hidden_size: int) -> Experts | None:
    """The experts of a mixture; NeMo takes the softmax over the chosen experts unless `moe_router_pre_softmax` is set.

    Raises:
        CheckpointError: another router than a softmax, or an invalid value.
    """
    if model.values.get("num_moe_experts") in (None, 0, 1):
        return None
    model.require(_REQUIRED_OF_MIXTURES, "a softmax router in every layer, and experts that all are chosen among")
    if model.values.get("moe_router_load_balancing_type") == "sinkhorn":
        raise model.error("moe_router_load_balancing_type", "is a router that is not supported (only softmax ones)")
    number, width = model.size("num_moe_experts", least=2), "moe_ffn_hidden_size"
    chosen = model.size("moe_router_topk", absent=2)
    if chosen > number:
        raise model.error("moe_router_topk", f"is more than the {number} experts that there are; correct it")
    normalized = not model.flag("moe_router_pre_softmax")
    return Experts(number, chosen, model.size(width, absent=ffn_hidden_size, null=ffn_hidden_size), normalized)


def has_such(family: Family, experts: Experts | None) -> bool:
    """Whether a family has such experts, or such a lack of them."""
    if family.experts is None or experts is None:
        return (family.experts is None) == (experts is None)
    return experts.normalized or family.experts.normalized is not None
