"""Rules about mixtures of experts: how experts lie on processes, and what does not go with them."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_lmpo.config.rules.layout import ParallelLayout
from nemo_lmpo.config.schema import ModelConfig
from nemo_lmpo.errors import shown
from nemo_lmpo.formats.lora_targets import MIXTRAL, MLP, projections_of


def experts(layout: ParallelLayout) -> Iterator[str]:
    """Every rank gets equally many experts, or equal parts of them."""
    model, found = layout.config.model, layout.architecture.experts
    if found is None:
        return
    expert, tensor = model.expert_model_parallel_size, model.expert_tensor_parallel_size
    if found.number % expert:
        yield (
            f"model.expert_model_parallel_size={expert} does not divide the model's {found.number} experts; choose a "
            f"divisor of it"
        )
    if found.ffn_hidden_size % tensor:
        yield (
            f"model.expert_tensor_parallel_size={tensor} does not divide the experts' inner size "
            f"{found.ffn_hidden_size}; choose a divisor of it"
        )
    cut = expert * tensor * model.pipeline_model_parallel_size
    if layout.world_size % cut:
        yield (
            f"{layout.world_size} processes do not divide by model.expert_model_parallel_size={expert} x "
            f"model.expert_tensor_parallel_size={tensor} x model.pipeline_model_parallel_size="
            f"{model.pipeline_model_parallel_size}; start a multiple of {cut} processes or change the layout"
        )
    if model.tensor_model_parallel_size > 1 and not model.sequence_parallel:
        yield (
            f"model.tensor_model_parallel_size={model.tensor_model_parallel_size} of a mixture of experts needs "
            f"model.sequence_parallel=true, without which every rank would send the same tokens to the experts; set it"
        )
    if model.fsdp and model.peft.name is not None:
        yield (
            f"model.peft.name={model.peft.name} of a mixture of experts does not go with model.fsdp=true, which nobody "
            f"has tried; set it to false"
        )
    if model.fsdp and (expert > 1 or tensor != model.tensor_model_parallel_size):
        yield (
            f"model.fsdp=true shares weights over the data-parallel ranks, which have to hold the same parts of the "
            f"same experts: set model.expert_model_parallel_size=1 and model.expert_tensor_parallel_size="
            f"{model.tensor_model_parallel_size}, or model.fsdp=false with optim.use_distributed_optimizer=true"
        )
    yield from _adapters(model, layout)


def _adapters(model: ModelConfig, layout: ParallelLayout) -> Iterator[str]:
    """With transformers 5, PEFT loads gate and up projections as one, and without down projections loads them wrong."""
    if model.peft.name is None:
        return
    targets = set(projections_of(model.peft.target_modules)) & set(MLP)
    if targets and targets != {"down_proj"} and targets != set(MLP):
        yield (
            f"model.peft.target_modules={shown(model.peft.target_modules)} names some projections of experts, which "
            f"peft does not load with transformers 5; name {', '.join(MLP)}, or down_proj alone, or none of them"
        )


def no_experts(layout: ParallelLayout) -> Iterator[str]:
    """Settings of experts belong to a model that has some."""
    yield from _names_of_mixtral(layout)
    if layout.architecture.experts is not None:
        return
    model, plain = layout.config.model, type(layout.config.model)()
    for name in ("expert_model_parallel_size", "expert_tensor_parallel_size", "moe_aux_loss", "moe_freeze_router"):
        value, usual = getattr(model, name), getattr(plain, name)
        if value != usual:
            shown = str(value).lower() if isinstance(value, bool) else value
            yield (
                f"model.{name}={shown} is for mixtures of experts, and a {layout.architecture.model_type} has no "
                f"experts; leave it out"
            )


def _names_of_mixtral(layout: ParallelLayout) -> Iterator[str]:
    experts = layout.architecture.family.experts
    for name in layout.config.model.peft.target_modules:
        if name in MIXTRAL and (experts is None or name not in (experts.gate, experts.up, experts.down)):
            yield (
                f"model.peft.target_modules names {shown(name)}, which a {layout.architecture.model_type} does not "
                f"have; write {MIXTRAL[name]}"
            )
