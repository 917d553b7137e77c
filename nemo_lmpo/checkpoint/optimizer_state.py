"""Optimizer state in a form that every layout reads, whether data-parallel ranks share it or not.

megatron-core's optimizer classes each have a format of their own. Here a parameter's moments (and its float32
main copy, if the model is in bfloat16) are stored like the parameter itself, under
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
    state: dict[str, Any] = {}
    for index, inner in enumerate(inner_optimizers(optimizer)):
        if getattr(inner, "is_stub_optimizer", False):
            continue
        if is_loading:
            inner.init_state_fn(inner.optimizer, inner.config)  # moments, which the first step would make
        if _is_shared(inner):
            state[f"{index}"] = _shared_state(inner, model_state)
        else:
            state[f"{index}"] = _plain_state(inner, model_state)
    return state


def load_optimizer_state(optimizer: Any, loaded: dict[str, Any], *, step: int) -> None:
    """Put tensors that were read back into the optimizer, and set its step count."""
    for index, inner in enumerate(inner_optimizers(optimizer)):
        if getattr(inner, "is_stub_optimizer", False):
            continue
        tensors = loaded[f"{index}"]
        if _is_shared(inner):
            _load_shared(inner, tensors)
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


def _is_shared(inner: Any) -> bool:
    """Whether this rank keeps a part of the state only."""
    return _is_distributed(inner) or any(is_shared(parameter) for parameter in inner.get_parameters())


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
    return {id(described_parameter(entry.data)): entry for entry in nested_values(sharded)}


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


def _shared_state(inner: Any, model_state: dict[str, Any]) -> dict[int, dict[str, list[Any]]]:
    """This rank's part of each parameter's state, in the format of a plain optimizer, without a copy or a gather."""
    by_identity = _sharded_parameters(model_state)
    return {
        number: {
            name: boxed(by_identity[id(model)], start, part, prefix=f"optimizer.state.{name}.")
            for name, part in tensors.items()
        }
        for number, (model, start, tensors) in enumerate(_shards(inner))
    }


def _shards(inner: Any) -> Iterator[tuple[Tensor, int, dict[str, Tensor]]]:
    """Parameters that this rank keeps state of: the model's, where its flat range starts, and the state's tensors."""
    if not _is_distributed(inner):
        yield from _shards_of_shared_parameters(inner)
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


def _shards_of_shared_parameters(inner: Any) -> Iterator[tuple[Tensor, int, dict[str, Tensor]]]:
    for parameter, _, state in _plain_parameters(inner):
        own = own_part(parameter)
        tensors = {name: own_part(state[name]).local for name in MOMENTS}
        if gathered_dtype(parameter) != parameter.dtype:
            tensors["fp32_param"] = own.local
        yield parameter, own.start, tensors


def _load_shared(inner: Any, loaded: dict[int, dict[str, list[Tensor]]]) -> None:
    for number, (_, _, tensors) in enumerate(_shards(inner)):
        for name, part in tensors.items():
            copy_from_boxes(part, loaded[number][name])
