"""Low-rank adapters on the experts of a mixture: an A and a B for each projection of each expert, as PEFT has them.

The adapters of a layer's experts that lie on a rank are stacked in one parameter for each projection and side. They
follow the experts over ranks, and are summed over the ranks that hold the same ones. Where each expert is cut
(`model.expert_tensor_parallel_size`), all ranks of a group see the same tokens and add up their outputs, so nothing
more is communicated for a token; the side that is whole on every rank (A of what is cut by rows, B of what is cut by
columns) has its gradient added up over the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_lmpo.config.schema import PeftConfig
from nemo_lmpo.formats.lora_targets import LINEARS, projections_of
from nemo_lmpo.model.lora_parts import LowRank, drawn, typed_modules


class ExpertAdapter(nn.Module):
    """The adapters on one linear layer (`linear_fc1`, `linear_fc2`) of all experts of a decoder layer.

    Args:
        experts: megatron-core's, one after the other or grouped.
        name: of the linear layer.
        layer: counts from 0 over the whole model.
        peft: rank, scale, dropout and projections.
        groups: megatron-core's process groups of the model.
    """

    def __init__(self, experts: nn.Module, name: str, layer: int, peft: PeftConfig, groups: Any) -> None:
        super().__init__()
        self.linear_name, self.layer = name, layer
        self.scale, self.dropout = peft.alpha / peft.rank, peft.dropout
        self.splits_output = name == "linear_fc1"
        # Held in a tuple, so that it does not become a submodule a second time.
        self._experts = (experts,)
        self._expert_group, self._tensor_group, self._data_group = groups.ep, groups.expt_tp, groups.expt_dp
        weight = first_weight(experts, name)
        rows, columns = weight.shape
        self.rows = int(rows) // len(LINEARS[name])
        wanted = [part for part in LINEARS[name] if part in projections_of(peft.target_modules)]
        number: Any = experts.num_local_experts
        parts = {part: LowRank(peft.rank, columns, self.rows, like=weight, stacked=(number,)) for part in wanted}
        self.parts = typed_modules(parts)
        self._opened: tuple[tuple[Tensor, ...], dict[str, tuple[Tensor, ...]]] | None = None
        self._mark()

    def _mark(self) -> None:
        """Tell megatron-core over which ranks gradients are summed, and which ranks count in the gradient norm."""
        from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

        for part in self.parts.values():
            whole = part.lora_A if self.splits_output else part.lora_B
            for parameter, dimension in ((part.lora_A, 2), (part.lora_B, 1)):
                parameter.allreduce = False  # type: ignore[attr-defined]
                # The ranks of tensor parallelism hold other experts, or compute other tokens: each rank's part counts.
                set_tensor_model_parallel_attributes(parameter, True, dimension, 1)
                parameter.shared = parameter is whole and self._tensor_group.rank() > 0  # type: ignore[attr-defined]

    def attach(self, enabled: Callable[[], bool]) -> None:
        """Add to the outputs of the experts' linear layers while ``enabled``."""
        (experts,) = self._experts
        experts.register_forward_pre_hook(lambda module, inputs: self._open() if enabled() else None)
        experts.register_forward_hook(lambda module, inputs, output: self._close())
        one_by_one: Any = getattr(experts, "local_experts", None)
        if one_by_one is None:
            experts.get_submodule(self.linear_name).register_forward_hook(self._add_to_all)
            return
        for number, expert in enumerate(one_by_one):
            expert.get_submodule(self.linear_name).register_forward_hook(partial(self._add_to_one, number))

    def _open(self) -> None:
        """Take the experts' parts once for a pass, so that their gradients are put together once.

        In backward, communicates over the group over which experts are cut.
        """

        def used(parameter: Tensor, *, whole: bool) -> Tensor:
            summed: Tensor = _SummedGradient.apply(parameter, self._tensor_group) if whole else parameter  # type: ignore[no-untyped-call]  # torch's
            return summed

        downs = [used(part.lora_A, whole=self.splits_output) for part in self.parts.values()]
        ups = {name: used(part.lora_B, whole=not self.splits_output) for name, part in self.parts.items()}
        self._opened = torch.cat(downs, dim=1).unbind(), {name: up.unbind() for name, up in ups.items()}

    def _close(self) -> None:
        self._opened = None

    def _add_to_one(self, number: int, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if self._opened is None:
            return None
        return (output[0] + self.added(number, inputs[0]), *output[1:])

    def _add_to_all(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if self._opened is None:
            return None
        tokens, counts = inputs
        added = [self.added(number, own) for number, own in enumerate(tokens.split(list(counts)))]
        return (output[0] + torch.cat(added), *output[1:])

    def added(self, number: int, hidden: Tensor) -> Tensor:
        """What is added to the output of an expert, ``[tokens, out]``, of its tokens ``[tokens, in]``.

        Args:
            number: of the expert, among those that lie here.
            hidden: the linear layer's input; may be of no token.
        """
        assert self._opened is not None
        down, ups = self._opened
        pieces = self._down(hidden, down[number])
        outputs = [
            F.linear(pieces[name], ups[name][number]) * self.scale
            if name in pieces
            else hidden.new_zeros(hidden.shape[0], self.rows)
            for name in LINEARS[self.linear_name]
        ]
        return torch.cat(outputs, dim=-1)

    def _down(self, hidden: Tensor, down: Tensor) -> dict[str, Tensor]:
        """``[tokens, rank]`` of each projection: dropped out anew for every one, as PEFT does."""
        if self.dropout == 0.0 or not self.training:
            pieces = F.linear(hidden, down).chunk(len(self.parts), dim=-1)
        else:
            matrices = down.chunk(len(self.parts))
            pieces = tuple(F.linear(F.dropout(hidden, self.dropout), matrix) for matrix in matrices)
        return dict(zip(self.parts, pieces, strict=True))

    def named_tensors(self) -> Iterator[tuple[str, nn.Parameter, int | None]]:
        """Name in a checkpoint, parameter ``[experts, ...]``, and the axis that cutting an expert cuts."""
        for name, part in self.parts.items():
            first = f"layers.{self.layer}.{name}"
            yield f"{first}.lora_A", part.lora_A, None if self.splits_output else 2
            yield f"{first}.lora_B", part.lora_B, 1 if self.splits_output else None

    def sharded_tensors(self, prefix: str) -> dict[str, Any]:
        """As megatron-core's distributed checkpoints take them: stacked over the experts of all ranks."""
        from megatron.core.dist_checkpointing import ShardedTensor

        result: dict[str, Any] = {}
        cut = (self._tensor_group.rank(), self._tensor_group.size())
        for name, parameter, axis in self.named_tensors():
            offsets = [(0, self._expert_group.rank(), self._expert_group.size())]
            if axis is not None:
                offsets.append((axis, *cut))
            replica = (0, cut[0] if axis is None else 0, self._data_group.rank())
            result[prefix + name] = ShardedTensor.from_rank_offsets(
                prefix + name, parameter, *offsets, replica_id=replica
            )
        return result

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """Start every A at random, each expert's from a generator of its own."""
        group = self._tensor_group
        for name, parameter, axis in self.named_tensors():
            if not name.endswith("lora_A"):
                continue
            first = self._expert_group.rank() * len(parameter)
            for number, own in enumerate(parameter):
                part = (group.rank(), group.size()) if axis is not None else (0, 1)
                own.copy_(drawn(f"{seed} {name} {first + number}", own, *part))


class _SummedGradient(torch.autograd.Function):
    """Passes a tensor on; its gradient is summed over a group.

    Not megatron-core's copy into the region of tensor parallelism, which sums contiguous gradients only.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        if ctx.group.size() > 1:
            torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


def first_weight(experts: nn.Module, name: str) -> Tensor:
    """The weight ``[out, in]`` of a linear layer of the first expert on this rank."""
    one_by_one: Any = getattr(experts, "local_experts", None)
    if one_by_one is None:
        return experts.get_parameter(f"{name}.weight0")
    weight: Tensor = one_by_one[0].get_submodule(name).weight
    return weight
