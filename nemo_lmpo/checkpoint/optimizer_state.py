"""Optimizer state in a form that every layout reads, whether data-parallel ranks share it or not.

megatron-core's optimizer classes each have a format of their own. Here a parameter's moments (and its float32
main copy, if the model is in bfloat16) are stored like the parameter itself, in the dtype that they are kept in, under
``optimizer.state.{exp_avg,exp_avg_sq,fp32_param}.<parameter>``, and nothing else but the step count is kept:
learning rates follow from the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nemo_lmpo.checkpoint.boxes import boxed, copy_from_boxes
from nemo_lmpo.checkpoint.weights import described_parameter
from nemo_lmpo.parallel.shards import gathered_dtype, is_shared, own_part

MOMENTS = ("exp_avg", "exp_avg_sq")


def inner_optimizers(optimizer: Any) -> list[Any]:
    """megatron-core chains one optimizer a kind of parameter; dense models have one."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def optimizer_sharded_state(optimizer: Any, model_state: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """The optimizer's tensors as a sharded state dict.

    Args:
        optimizer: megatron-core optimizer.
        model_state: the model chunks' sharded state dict, made with ``keep_vars=True`` semantics (its tensors
            are the parameters themselves).
        is_loading: whether tensors are to be filled, so that missing state must be made first.

    Nothing is communicated, and nothing copied: the tensors are the optimizer's own or views of them.
    """
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    def sharded(entry: Any, start: int, tensor: Tensor, name: str, is_part: bool) -> Any:
        if is_part:
            return boxed(entry, start, tensor, prefix=f"optimizer.state.{name}.")
        return make_sharded_optimizer_tensor(entry, tensor, prefix=f"optimizer.state.{name}")

    state: dict[str, Any] = {}
    for index, inner in enumerate(inner_optimizers(optimizer)):
        if getattr(inner, "is_stub_optimizer", False):
            continue
        if is_loading:
            inner.init_state_fn(inner.optimizer, inner.config)  # moments, which the first step would make
        is_part, by_identity = _is_shared(inner), _sharded_parameters(model_state)
        state[f"{index}"] = {
            number: {
                name: sharded(by_identity[id(model)], start, tensor, name, is_part) for name, tensor in tensors.items()
            }
            for number, (model, start, tensors) in enumerate(_parameters(inner))
        }
    return state


def load_optimizer_state(optimizer: Any, loaded: dict[str, Any], *, step: int) -> None:
    """Put tensors that were read back into the optimizer, and set its step count."""
    for index, inner in enumerate(inner_optimizers(optimizer)):
        if getattr(inner, "is_stub_optimizer", False):
            continue
        copy = copy_from_boxes if _is_shared(inner) else Tensor.copy_
        for number, (_, _, tensors) in enumerate(_parameters(inner)):
            for name, tensor in tensors.items():
                copy(tensor, loaded[f"{index}"][number][name])
        _set_step(inner, step)


def _is_distributed(inner: Any) -> bool:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return isinstance(inner, DistributedOptimizer)


def _is_shared(inner: Any) -> bool:
    """Whether this rank keeps a part of the state only."""
    return _is_distributed(inner) or any(is_shared(parameter) for parameter in inner.get_parameters())


def _set_step(inner: Any, step: int) -> None:
    """Torch keeps the count with each parameter, the fused optimizers with each group; on the host torch steps."""
    if inner.config.optimizer_cpu_offload:
        for state in inner.optimizer.state.values():
            state["step"].fill_(step)
        return
    for group in inner.optimizer.param_groups:
        if "step" in group or not isinstance(inner.optimizer, torch.optim.AdamW):
            group["step"] = step
        for parameter in group["params"]:
            if isinstance(inner.optimizer, torch.optim.AdamW) and parameter in inner.optimizer.state:
                device = parameter.device if group["fused"] else "cpu"
                inner.optimizer.state[parameter]["step"] = torch.full((), float(step), device=device)


def _sharded_parameters(model_state: dict[str, Any]) -> dict[int, Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    sharded, _ = extract_sharded_tensors_and_factories(model_state)
    return {id(described_parameter(entry.data)): entry for entry in nested_values(sharded)}


def _parameters(inner: Any) -> Iterator[tuple[Tensor, int, dict[str, Tensor]]]:
    """What this rank keeps state of: the model's parameter, where its part of it begins, and the state's tensors."""
    if not _is_distributed(inner):
        yield from _plain_parameters(inner)
        return
    for ranges in inner.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for model, places in bucket["param_map"].items():
                    state = inner._get_main_param_and_optimizer_states(model)
                    tensors = {name: state[name] for name in MOMENTS}
                    if inner.config.bf16:  # a float32 model's parameters are their own main copies
                        tensors["fp32_param"] = state["param"]
                    yield model, places["param"].start, tensors


def _plain_parameters(inner: Any) -> Iterator[tuple[Tensor, int, dict[str, Tensor]]]:
    """The same of an optimizer whose state lies as the parameters do: whole, or in parts (FSDP)."""
    model_of_main: dict[int, Tensor] = {}
    for model_group, main_group in zip(
        getattr(inner, "float16_groups", []), getattr(inner, "fp32_from_float16_groups", []), strict=True
    ):
        model_of_main.update((id(main), model) for model, main in zip(model_group, main_group, strict=True))
    for group in inner.optimizer.param_groups:
        for main in group["params"]:
            model = model_of_main.get(id(main), main)
            tensors = {name: own_part(inner.optimizer.state[main][name]).local for name in MOMENTS}
            if main is not model or gathered_dtype(model) != model.dtype:
                tensors["fp32_param"] = own_part(main).local
            yield model, own_part(model).start, tensors
