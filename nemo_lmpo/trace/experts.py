"""Mixtures of experts on fake tensors.

Which expert a token goes to is a value, and fake tensors have none. Every rank is taken to send each expert equally
many tokens, up to one: the sizes of all-to-alls and of products follow from that. Routers, dispatchers and experts are
the real ones otherwise.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nemo_lmpo.sizing.work import Product
from nemo_lmpo.trace.meter import Meter

if TYPE_CHECKING:
    Patch = tuple[Any, str, Any]

Counts = np.ndarray[Any, np.dtype[np.int64]]


def even_loads(choices: int, experts: int) -> Counts:
    """How many of ``choices`` each expert gets, ``[experts]``: equally many, up to one."""
    return np.array([choices // experts + (expert < choices % experts) for expert in range(experts)])


def expert_patches(meter: Meter, transformer_engine: bool) -> list[Patch]:
    """What makes megatron-core's layers of experts run without values.

    Args:
        meter: what measures.
        transformer_engine: with the forms that Transformer Engine brings, by their memory and number of kernels: a
            product per expert in one call, which adds its gradient to the weight's in place; and tokens laid out by
            one kernel.
    """
    dispatchers = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    experts = importlib.import_module("megatron.core.transformer.moe.experts")
    dispatcher = dispatchers.MoEAlltoAllTokenDispatcher
    patches: list[Patch] = [(dispatcher, "preprocess", _with_even_loads(meter, dispatcher.preprocess))]
    if not transformer_engine:
        return [*patches, (dispatchers, "permute", _with_known_number(meter, dispatchers.permute))]

    # megatron-core 0.19 can pad what an expert gets, and says how; nothing is padded here.
    padding = (None, None) if "align_size" in inspect.signature(dispatchers.permute).parameters else ()

    def permute(tokens: Tensor, routing: Tensor, probs: Tensor, num_out_tokens: int, **_: object) -> Any:
        laid = _FusedPermute.apply(tokens, probs, routing, num_out_tokens, meter)  # type: ignore[no-untyped-call]  # torch's
        return (*laid, *padding)

    def unpermute(tokens: Tensor, rows: Tensor, restore_shape: torch.Size, **_: object) -> Any:
        return _FusedMove.apply(tokens, rows, restore_shape, meter)  # type: ignore[no-untyped-call]  # torch's

    def sort_chunks(tokens: Tensor, *_: object, probs: Tensor | None = None, **__: object) -> Any:
        rows = torch.empty(tokens.shape[0], dtype=torch.int32)
        moved = [None if each is None else _FusedMove.apply(each, rows, each.shape, meter) for each in (tokens, probs)]  # type: ignore[no-untyped-call]  # torch's
        return tuple(moved)

    return [
        *patches,
        (dispatchers, "permute", permute),
        (dispatchers, "unpermute", unpermute),
        (dispatchers, "sort_chunks_by_idxs", sort_chunks),
        (experts.SequentialMLP, "forward", _grouped(meter, experts.SequentialMLP.forward)),
    ]


def _with_even_loads(meter: Meter, preprocess: Callable[..., Any]) -> Callable[..., Counts]:
    """A dispatcher's preparation, whose results are replaced by those of even loads."""

    def prepare(self: Any, routing: Tensor) -> Counts:
        preprocess(self, routing)
        loads = even_loads(self.num_out_tokens, self.num_experts)
        ours, senders = loads[self.local_expert_indices], self.tp_size * self.ep_size
        if senders > 1:
            self.input_splits = loads.reshape(self.ep_size, -1).sum(axis=1)
            self.output_splits = np.full(self.ep_size, ours.sum())
            self.output_splits_tp = np.full(self.tp_size, ours.sum() * self.ep_size)
        self.num_global_tokens_per_local_expert = np.tile(ours, (senders, 1))
        chunks = np.arange(self.num_experts * self.tp_size)
        self.sort_input_by_local_experts = chunks.reshape(-1, self.num_local_experts).T.ravel()
        self.restore_output_by_local_experts = chunks.reshape(self.num_local_experts, -1).T.ravel()
        meter.work.host_reads += 1  # all of them are copied at once
        received: Counts = ours * senders
        return received

    return prepare


def _with_known_number(meter: Meter, permute: Callable[..., Any]) -> Callable[..., Any]:
    """megatron-core's own laying by expert, which selects as many elements of a mask as there are choices."""

    def lay(*args: Any, num_out_tokens: int, **kwargs: Any) -> Any:
        meter.selected = num_out_tokens
        try:
            return permute(*args, num_out_tokens=num_out_tokens, **kwargs)
        finally:
            meter.selected = None

    return lay


class _FusedPermute(torch.autograd.Function):
    """Tokens ``[T, H]`` and their weights ``[T, E]`` laid by expert, by Transformer Engine's kernels.

    Three kernels make a map ``[T, 2 E + 1]`` of int32, which backward keeps; one moves tokens and weights.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, probs: Tensor, routing: Tensor, number: int, meter: Meter
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.meter, ctx.shapes, ctx.dtypes = meter, (tokens.shape, probs.shape), (tokens.dtype, probs.dtype)
        with meter.fused("permute_map", routing):
            rows = torch.empty(tokens.shape[0], 2 * probs.shape[1] + 1, dtype=torch.int32)
        meter.work.kernels["permute_map"] += 2
        with meter.fused("permute", (probs, rows)):
            laid = torch.empty(number, tokens.shape[1], dtype=tokens.dtype)
            laid_probs = torch.empty(number, dtype=probs.dtype)
        meter.work.moved["permute"] += laid.nbytes  # a token is read for each of its choices
        ctx.save_for_backward(rows)
        ctx.mark_non_differentiable(rows)
        return laid, laid_probs, rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        with ctx.meter.fused("permute_backward", (*gradients[:2], rows)):
            found = [torch.empty(shape, dtype=dtype) for shape, dtype in zip(ctx.shapes, ctx.dtypes, strict=True)]
        return (*found, None, None, None)


class _FusedMove(torch.autograd.Function):
    """Rows moved to where a map says, added up where they meet: one kernel each way, which keeps the map alone."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, rows: Tensor, shape: torch.Size, meter: Meter) -> Tensor:
        ctx.meter, ctx.shape, ctx.dtype = meter, tokens.shape, tokens.dtype
        ctx.save_for_backward(rows)
        with meter.fused("move_rows", (tokens, rows)):
            return torch.empty(shape, dtype=tokens.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.meter.fused("move_rows_backward", (*gradients, *ctx.saved_tensors)):
            return torch.empty(ctx.shape, dtype=ctx.dtype), None, None, None


def _grouped(meter: Meter, one_by_one: Callable[..., Any]) -> Callable[..., Any]:
    """Experts as Transformer Engine's grouped linear layers compute them; with adapters, one after the other still."""
    activation = importlib.import_module("megatron.core.fusions.fused_bias_swiglu").weighted_bias_swiglu_impl
    stand_ins: dict[torch.Size, Tensor] = {}

    def forward(self: Any, hidden: Tensor, loads: Counts, probs: Tensor) -> Any:
        if any(linear._forward_hooks for linear in self.local_experts[0].children()):
            return one_by_one(self, hidden, loads, probs)
        first, second = (
            [getattr(expert, name).weight for expert in self.local_experts] for name in ("linear_fc1", "linear_fc2")
        )
        inner = _Grouped.apply(hidden, meter, stand_ins, *first)  # type: ignore[no-untyped-call]  # torch's
        inner = activation(inner, None, probs.unsqueeze(-1))
        return _Grouped.apply(inner, meter, stand_ins, *second), None  # type: ignore[no-untyped-call]  # torch's

    return forward


class _Grouped(torch.autograd.Function):
    """Products of several experts' rows ``[R, K]`` with their weights ``[N, K]`` each, ``[R, N]``.

    Transformer Engine calls cuBLAS for each of them. It keeps the rows, and adds gradients of weights to
    ``main_grad`` within the product; what it returns for them is a tensor per shape that stands in.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, meter: Meter, stand_ins: dict[torch.Size, Tensor], *weights: Tensor) -> Tensor:
        ctx.meter, ctx.stand_ins = meter, stand_ins
        ctx.save_for_backward(rows, *weights)
        ctx.weights = weights  # `main_grad` is not kept with saved tensors
        _count(meter, rows.shape[0], weights, (0, 1))
        return torch.empty(rows.shape[0], weights[0].shape[0], dtype=rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, *weights = ctx.saved_tensors
        _count(ctx.meter, rows.shape[0], weights, (1, 0))
        of_rows = torch.empty_like(rows)
        if not weights[0].requires_grad:
            return (of_rows, None, None, *([None] * len(weights)))
        columns, depth = weights[0].shape
        product = Product(columns, depth, max(1, rows.shape[0] // len(weights)), len(weights), grouped=True)
        ctx.meter.work.products[product] += 1
        ctx.meter.work.kernels["grouped"] += len(weights)
        return (of_rows, None, None, *(_added_in_place(ctx, weight) for weight in ctx.weights))


def _count(meter: Meter, rows: int, weights: Any, order: tuple[int, int]) -> None:
    columns, depth = (weights[0].shape[number] for number in order)
    meter.work.products[Product(max(1, rows // len(weights)), columns, depth, len(weights), grouped=True)] += 1
    meter.work.kernels["grouped"] += len(weights)


def _added_in_place(ctx: Any, weight: Any) -> Tensor:
    """A stand-in for a gradient that has been added to `main_grad`, or the gradient where there is none.

    The addition is counted with those of all linear layers (:func:`nemo_lmpo.trace.world.add_gradients_in_place`).
    """
    if not hasattr(weight, "main_grad"):
        return torch.empty_like(weight)
    if weight.shape not in ctx.stand_ins:
        ctx.stand_ins[weight.shape] = torch.empty_like(weight)
    stand_ins: dict[torch.Size, Tensor] = ctx.stand_ins
    return stand_ins[weight.shape].detach()
