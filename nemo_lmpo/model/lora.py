"""Low-rank adapters (LoRA, Hu et al. 2021) on megatron-core's linear layers, local or Transformer Engine's.

megatron-core 0.16 to 0.19 has none, and those of its neighbours come with requirements of their own. The arithmetic is
PEFT's: ``y += alpha / rank * B A dropout(x)``, with an A and a B for every projection, also where megatron-core keeps
several in one matrix, so that adapters are PEFT's tensor by tensor. The base layers stay as they are: a hook adds to
their output, so names of weights, checkpoints and loading do not change.

Tensor parallelism follows the base layer. Where its output is split (`linear_qkv`, `linear_fc1`), A is whole on every
rank and B is cut by rows; where its input is split (`linear_proj`, `linear_fc2`), A is cut by columns and B is whole.
Only the low-rank activations are communicated. Adapters on the experts of a mixture are those of
:mod:`nemo_lmpo.model.expert_lora`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_lmpo.config.schema import PeftConfig
from nemo_lmpo.formats.architecture import Architecture
from nemo_lmpo.formats.lora_targets import ADAPTERS, LINEARS, projections_of
from nemo_lmpo.model.expert_lora import ExpertAdapter
from nemo_lmpo.model.lora_parts import LowRank, drawn, typed_modules
from nemo_lmpo.model.packed_gpt import PackedGPTModel


class LinearAdapter(nn.Module):
    """The adapters on one linear layer of one decoder layer; called with the layer's input, gives what is added."""

    def __init__(
        self, linear: nn.Module, name: str, layer: int, peft: PeftConfig, architecture: Architecture, group: Any
    ) -> None:
        super().__init__()
        self._tensor_group = group
        config: Any = linear.config
        self.linear_name = name
        self.layer = layer
        """Counts from 0 over the whole model."""
        self.scale = peft.alpha / peft.rank
        self.dropout = peft.dropout
        self.sequence_parallel = bool(config.sequence_parallel)
        self.splits_output = name in ("linear_qkv", "linear_fc1")
        # Held in a tuple, so that it does not become a submodule a second time.
        self._linear = (linear,)
        self._groups = architecture.num_query_groups // config.tensor_model_parallel_size
        self._norm_eps: float = config.layernorm_epsilon
        weight: Any = linear.weight
        rows, columns = weight.shape
        self.rows = _rows_of_parts(name, int(rows), architecture)
        wanted = [part for part in LINEARS[name] if part in projections_of(peft.target_modules)]
        parts = {part: LowRank(peft.rank, int(columns), self.rows[part], like=weight) for part in wanted}
        self.parts = typed_modules(parts)
        self._mark()

    def _mark(self) -> None:
        """Tell megatron-core which parameters are split, and which see a part of the sequence only.

        The first decides what counts in the gradient norm, the second what is summed over the tensor-parallel group.
        """
        from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

        for part in self.parts.values():
            split, dimension = (part.lora_B, 0) if self.splits_output else (part.lora_A, 1)
            set_tensor_model_parallel_attributes(split, True, dimension, 1)
            whole = part.lora_A if self.splits_output else part.lora_B
            whole.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    @property
    def linear(self) -> nn.Module:
        """The base layer."""
        return self._linear[0]

    def forward(self, hidden: Tensor) -> Tensor:
        """What is added to the linear layer's output, in that output's form.

        Communicates over the tensor-parallel group: ``rank`` numbers a token and projection, as the base layer does
        with its activations.
        """
        return self._output_split(self._normed(hidden)) if self.splits_output else self._input_split(hidden)

    def _normed(self, hidden: Tensor) -> Tensor:
        """Transformer Engine's layers take the norm inside; its frozen weight is the same for the adapters."""
        weight = getattr(self.linear, "layer_norm_weight", None)
        if weight is None:
            return hidden
        return F.rms_norm(hidden, (hidden.shape[-1],), weight, self._norm_eps)

    def _down(self, hidden: Tensor) -> Tensor:
        """``[..., parts * rank]``: dropped out anew for every projection, as PEFT does."""
        if self.dropout == 0.0 or not self.training:
            return F.linear(hidden, torch.cat([part.lora_A for part in self.parts.values()]))
        return torch.cat(
            [F.linear(F.dropout(hidden, self.dropout), part.lora_A) for part in self.parts.values()], dim=-1
        )

    def _output_split(self, hidden: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import (
            copy_to_tensor_model_parallel_region,
            gather_from_sequence_parallel_region,
        )

        down = self._down(hidden)
        if self.sequence_parallel:
            down = gather_from_sequence_parallel_region(down)
        else:
            down = copy_to_tensor_model_parallel_region(down)
        pieces = dict(zip(self.parts, down.chunk(len(self.parts), dim=-1), strict=True))
        outputs = []
        for name, rows in self.rows.items():
            if name in pieces:
                outputs.append(F.linear(pieces[name], self.parts[name].lora_B) * self.scale)
            else:
                outputs.append(down.new_zeros(*down.shape[:-1], rows))
        if self.linear_name == "linear_fc1":
            return torch.cat(outputs, dim=-1)
        # Queries, keys and values lie together for every key-value group.
        grouped = [output.unflatten(-1, (self._groups, -1)) for output in outputs]
        return torch.cat(grouped, dim=-1).flatten(-2)

    def _input_split(self, hidden: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import (
            reduce_from_tensor_model_parallel_region,
            reduce_scatter_to_sequence_parallel_region,
        )

        (part,) = self.parts.values()
        down = self._down(hidden)
        if self.sequence_parallel:
            down = reduce_scatter_to_sequence_parallel_region(down)
        else:
            down = reduce_from_tensor_model_parallel_region(down)
        return F.linear(down, part.lora_B) * self.scale

    def named_tensors(self) -> Iterator[tuple[str, nn.Parameter, int | None]]:
        """Name in a checkpoint, parameter, and the axis that tensor parallelism cuts."""
        for name, part in self.parts.items():
            first = f"layers.{self.layer}.{name}"
            yield f"{first}.lora_A", part.lora_A, None if self.splits_output else 1
            yield f"{first}.lora_B", part.lora_B, 0 if self.splits_output else None

    def sharded_tensors(self, prefix: str) -> dict[str, Any]:
        """As megatron-core's distributed checkpoints take them."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        result: dict[str, Any] = {}
        for name, parameter, axis in self.named_tensors():
            axes = {} if axis is None else {name: axis}
            result.update(make_sharded_tensors_for_checkpoint({name: parameter}, prefix, axes))
        return result

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """Start every A at random."""
        for name, parameter, axis in self.named_tensors():
            if name.endswith("lora_A"):
                part = (self._tensor_group.rank(), self._tensor_group.size()) if axis == 1 else (0, 1)
                parameter.copy_(drawn(f"{seed} {name}", parameter, *part))

    def attach(self, enabled: Callable[[], bool]) -> None:
        """Add to the linear layer's output while ``enabled``."""

        def add(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            return (output[0] + self(inputs[0]), *output[1:]) if enabled() else None

        self.linear.register_forward_hook(add)


def _rows_of_parts(name: str, rows: int, architecture: Architecture) -> dict[str, int]:
    """This rank's outputs of each projection in a linear layer with ``rows`` outputs."""
    parts = LINEARS[name]
    if name != "linear_qkv":
        return dict.fromkeys(parts, rows // len(parts))
    heads = architecture.num_attention_heads // architecture.num_query_groups
    unit = rows // (heads + 2)
    return dict(zip(parts, (heads * unit, unit, unit), strict=True))


class Adapters(nn.Module):
    """All adapters of a model chunk, by layer and linear layer."""

    def __init__(self, adapters: dict[str, LinearAdapter | ExpertAdapter]) -> None:
        super().__init__()
        self.by_linear = typed_modules(adapters)
        self.enabled = True
        """Without, the model is its base."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As megatron-core's distributed checkpoints take it; layers are counted over the whole model."""
        result: dict[str, Any] = {}
        for adapter in self.by_linear.values():
            result.update(adapter.sharded_tensors(prefix))
        return result

    def by_name(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters by the names of :meth:`LinearAdapter.named_tensors`."""
        for adapter in self.by_linear.values():
            for name, parameter, _ in adapter.named_tensors():
                yield name, parameter

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over tensors by the names of :meth:`LinearAdapter.named_tensors`, this rank's parts.

        Raises:
            KeyError: one is missing; distributed checkpoints are checked for that before.
        """
        with torch.no_grad():
            for name, parameter in self.by_name():
                parameter.copy_(tensors[name])


def add_adapters(chunks: Sequence[PackedGPTModel], peft: PeftConfig, architecture: Architecture, *, seed: int) -> None:
    """Freeze the chunks and put adapters on them; before they are wrapped for data parallelism.

    A starts uniform as PEFT's does, from a generator of its own for every tensor, so that it does not depend on the
    layout; B starts at zero, so the policy starts as its base.
    """
    for chunk in chunks:
        chunk.requires_grad_(False)
        found: dict[str, LinearAdapter | ExpertAdapter] = {}
        groups = chunk.pg_collection
        for layer in chunk.decoder.layers:
            number = layer.layer_number - 1
            for name, block in (
                ("linear_qkv", layer.self_attention),
                ("linear_proj", layer.self_attention),
                ("linear_fc1", layer.mlp),
                ("linear_fc2", layer.mlp),
            ):
                if set(LINEARS[name]).isdisjoint(projections_of(peft.target_modules)):
                    continue
                if block is layer.mlp and architecture.experts is not None:
                    found[f"{number}_{name}"] = ExpertAdapter(block.experts, name, number, peft, groups)
                    continue
                linear = getattr(block, name)
                found[f"{number}_{name}"] = LinearAdapter(linear, name, number, peft, architecture, groups.tp)
        adapters = Adapters(found)
        chunk.add_module(ADAPTERS, adapters)
        for adapter in adapters.by_linear.values():
            adapter.draw(seed)
        _hook(chunk, adapters)


def _hook(chunk: PackedGPTModel, adapters: Adapters) -> None:
    for adapter in adapters.by_linear.values():
        adapter.attach(lambda: adapters.enabled)
    if chunk.pre_process:
        # Nothing before the first adapter needs a gradient, and a recomputed layer whose input needs none has none.
        chunk.embedding.register_forward_hook(_with_gradient)


def _with_gradient(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and output.is_leaf else output


def adapters_of(chunk: nn.Module) -> Adapters | None:
    """The adapters of a bare chunk, if it has some."""
    found = getattr(chunk, ADAPTERS, None)
    return found if isinstance(found, Adapters) else None


@contextmanager
def adapters_off(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """The base model for a block: what DPO, IPO and KTO compare with."""
    found = [adapters for chunk in chunks if (adapters := adapters_of(chunk)) is not None]
    for adapters in found:
        adapters.enabled = False
    try:
        yield
    finally:
        for adapters in found:
            adapters.enabled = True
