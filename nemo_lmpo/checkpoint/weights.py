"""The policy's weights as megatron-core's distributed checkpoints take them, in every layout the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nemo_lmpo.checkpoint.boxes import boxed, copy_from_boxes
from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.formats.adapters import PREFIX
from nemo_lmpo.model.lora import adapters_of
from nemo_lmpo.model.packed_gpt import PackedGPTModel
from nemo_lmpo.parallel.shards import gathered_dtype, is_shared, own_part

_EXTRA_STATE = re.compile(r"_extra_state\d*$")
"""A module's, or with a number that of an expert in a grouped one."""


def describe_weights(chunks: Sequence[PackedGPTModel]) -> dict[str, Any]:
    """Where each parameter of this process belongs in the whole, as megatron-core's sharded tensors.

    Without Transformer Engine's extra states: they hold scales of FP8, which is not used, and which of them exist
    depends on the kernels, so that a checkpoint could be read by the same kernels only.

    Parameters that data-parallel ranks share are described as what they are parts of, without memory
    (:func:`described_parameter`).
    """
    return {f"model{index}": _described(chunk) for index, chunk in enumerate(chunks)}


def sharded_weights(description: dict[str, Any]) -> dict[str, Any]:
    """This process's part of the weights that :func:`describe_weights` describes, in the dtype that forward sees."""
    return {chunk: {name: _own(entry) for name, entry in entries.items()} for chunk, entries in description.items()}


def described_parameter(data: Tensor) -> Tensor:
    """The parameter that a description's tensor stands for: itself, unless ranks share it."""
    parameter: Tensor = getattr(data, "described_parameter", data)
    return parameter


def _described(chunk: PackedGPTModel) -> dict[str, Any]:
    """A chunk's weights, or its adapters alone where it has some."""
    with _whole_shapes(chunk):
        adapters = adapters_of(chunk)
        if adapters is not None:
            return adapters.sharded_state_dict(prefix=PREFIX)
        entries = chunk.sharded_state_dict(prefix="model.")
        return {name: entry for name, entry in entries.items() if not _EXTRA_STATE.search(name)}


@contextmanager
def _whole_shapes(chunk: nn.Module) -> Iterator[None]:
    """For the block, in the places of parameters that ranks share, tensors with their whole shape and no memory."""
    standing_in: dict[int, nn.Parameter] = {}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in chunk.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not is_shared(parameter):
                continue
            if id(parameter) not in standing_in:
                whole = torch.empty(parameter.shape, dtype=gathered_dtype(parameter), device="meta")
                stand_in = nn.Parameter(whole, requires_grad=parameter.requires_grad)
                vars(stand_in).update(vars(parameter), described_parameter=parameter)
                standing_in[id(parameter)] = stand_in
            replaced.append((module, name, parameter))
    for module, name, parameter in replaced:
        module._parameters[name] = standing_in[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


def _own(entry: Any) -> Any:
    """A described parameter as it is, or this rank's part of it."""
    parameter = described_parameter(entry.data)
    if not is_shared(parameter):
        return entry
    own = own_part(parameter)
    return boxed(entry, own.start, own.local.to(gathered_dtype(parameter)))


def load_weights(chunks: Sequence[PackedGPTModel], state: dict[str, Any]) -> None:
    """Put weights that were loaded into :func:`sharded_weights` into the model.

    Raises:
        CheckpointError: a tensor of the model is missing, or one is there that it does not have.
    """
    for index, chunk in enumerate(chunks):
        adapters = adapters_of(chunk)
        prefix = "model." if adapters is None else PREFIX
        tensors = {name.removeprefix(prefix): tensor for name, tensor in state[f"model{index}"].items()}
        if any(is_shared(parameter) for parameter in chunk.parameters()):
            _load_parts(dict(chunk.named_parameters() if adapters is None else adapters.by_name()), tensors)
        elif adapters is not None:
            adapters.load(tensors)
        else:
            result = chunk.load_state_dict(tensors, strict=False)
            missing = [name for name in result.missing_keys if not _EXTRA_STATE.search(name)]
            _refuse_other_names(missing, result.unexpected_keys)


def _load_parts(parameters: dict[str, nn.Parameter], tensors: dict[str, list[Tensor]]) -> None:
    """The boxes of this rank's parts, but for those that the optimizer's float32 state holds without rounding."""
    _refuse_other_names(sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys()))
    for name, parameter in parameters.items():
        if gathered_dtype(parameter) == parameter.dtype:
            copy_from_boxes(own_part(parameter).local, tensors[name])


def _refuse_other_names(missing: Sequence[str], unknown: Sequence[str]) -> None:
    if missing or unknown:
        raise CheckpointError(
            f"the checkpoint is of another model: {len(missing)} tensors are missing and {len(unknown)} unknown, first "
            f"{[*missing, *unknown][0]}"
        )
