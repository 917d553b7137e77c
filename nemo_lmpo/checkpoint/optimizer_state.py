"""Optimizer state in a form that every layout reads, with or without the distributed optimizer.

megatron-core's optimizer classes each have a format of their own. Here a parameter's moments (and its float32
main copy, if the model is in bfloat16) are stored like the parameter itself, under
``optimizer.state.{exp_avg,exp_avg_sq,fp32_param}.<parameter>``, and nothing else but the step count is kept:
learning rates follow from the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
_RESHARDABLE = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


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

    Communicates over the data-parallel group when saving a distributed optimizer (it gathers the shards).
    """
    state: dict[str, Any] = {}
    for index, inner in enumerate(inner_optimizers(optimizer)):
        if getattr(inner, "is_stub_optimizer", False):
            continue
        if is_loading:
            _make_state(inner)
        if _is_distributed(inner):
            state[f"{index}"] = _distributed_state(inner, model_state, is_loading)
        else:
            state[f"{index}"] = _plain_state(inner, model_state)
    return state


def load_optimizer_state(optimizer: Any, loaded: dict[str, Any], *, step: int) -> None:
    """Put tensors that were read back into the optimizer, and set its step count."""
    for index, inner in enumerate(inner_optimizers(optimizer)):
        if getattr(inner, "is_stub_optimizer", False):
            continue
        tensors = loaded[f"{index}"]
        if _is_distributed(inner):
            _load_distributed(inner, tensors)
        else:
            for number, (_, main, state) in enumerate(_plain_parameters(inner)):
                for name in MOMENTS:
                    state[name].copy_(tensors[number][name])
                if "fp32_param" in tensors[number]:
                    main.data.copy_(tensors[number]["fp32_param"])
        _set_step(inner, step)


def _is_distributed(inner: Any) -> bool:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return isinstance(inner, DistributedOptimizer)


def _make_state(inner: Any) -> None:
    """Allocate moments that the first step would allocate."""
    inner.init_state_fn(inner.optimizer, inner.config)


def _set_step(inner: Any, step: int) -> None:
    """Torch keeps the count with each parameter, the fused optimizers with each group."""
    for group in inner.optimizer.param_groups:
        if "step" in group or not isinstance(inner.optimizer, torch.optim.AdamW):
            group["step"] = step
        for parameter in group["params"]:
            if isinstance(inner.optimizer, torch.optim.AdamW) and parameter in inner.optimizer.state:
                inner.optimizer.state[parameter]["step"] = torch.tensor(float(step))


def _plain_parameters(inner: Any) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Model parameter, main parameter (the same one in float32) and state, of a non-distributed optimizer."""
    model_of_main: dict[int, Tensor] = {}
    for model_group, main_group in zip(
        getattr(inner, "float16_groups", []), getattr(inner, "fp32_from_float16_groups", []), strict=True
    ):
        model_of_main.update((id(main), model) for model, main in zip(model_group, main_group, strict=True))
    for group in inner.optimizer.param_groups:
        for main in group["params"]:
            yield model_of_main.get(id(main), main), main, inner.optimizer.state[main]


def _sharded_parameters(model_state: dict[str, Any]) -> dict[int, Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    sharded, _ = extract_sharded_tensors_and_factories(model_state)
    return {id(entry.data): entry for entry in nested_values(sharded)}


def _plain_state(inner: Any, model_state: dict[str, Any]) -> dict[int, dict[str, Any]]:
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    by_identity = _sharded_parameters(model_state)
    result: dict[int, dict[str, Any]] = {}
    for number, (model, main, state) in enumerate(_plain_parameters(inner)):
        tensors = {name: state[name] for name in MOMENTS}
        if main is not model:
            tensors["fp32_param"] = main
        result[number] = {
            name: make_sharded_optimizer_tensor(by_identity[id(model)], tensor, prefix=f"optimizer.state.{name}")
            for name, tensor in tensors.items()
        }
    return result


def _distributed_state(inner: Any, model_state: dict[str, Any], is_loading: bool) -> dict[int, dict[str, Any]]:
    """The format of a plain optimizer: a tensor a parameter, and no main copy where the model is in float32."""
    state = inner.sharded_param_state_fully_reshardable(model_state, is_loading, _RESHARDABLE)
    keeps_main = inner.config.bf16
    result: dict[int, dict[str, Any]] = {}
    for number, tensors in state.items():
        result[number] = {name: tensors[name] for name in MOMENTS}
        if keeps_main:
            main = tensors["param"]
            key = main.key.replace("optimizer.state.param.", "optimizer.state.fp32_param.", 1)
            result[number]["fp32_param"] = replace(main, key=key)
    return result


def _load_distributed(inner: Any, tensors: dict[int, dict[str, Tensor]]) -> None:
    for state in inner.optimizer.state.values():
        state.pop("step", None)  # the loader below wants tensors of the parameter's shape only
    parameters = [parameter for buffer in inner.buffers for parameter in buffer.param_index_map]
    complete = {
        number: {"fp32_param": parameters[number].detach(), **tensors[number]} for number in range(len(parameters))
    }
    inner.load_parameter_state_from_fully_reshardable(complete)
