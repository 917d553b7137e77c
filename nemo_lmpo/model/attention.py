"""Core attention on packed sequences: all spans at once, the prompt's keys gathered in front of each response."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from nemo_lmpo.model.attention_plan import AttentionPlan

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig


class _GatherKeys(torch.autograd.Function):
    """``states[plan.keys]``, with a backward that adds up in a fixed order and without atomic operations."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, plan: AttentionPlan) -> Tensor:
        assert plan.keys is not None
        ctx.plan = plan
        return states.index_select(0, plan.keys)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        plan: AttentionPlan = ctx.plan
        assert plan.key_uses is not None
        assert plan.key_unused is not None
        tokens, uses = plan.key_uses.shape
        gathered = gradients[0].index_select(0, plan.key_uses.flatten())
        gathered = gathered.masked_fill_(plan.key_unused[:, None, None], 0.0)
        return gathered.view(tokens, uses, *gathered.shape[1:]).sum(dim=1), None


def gather_over_ranks(part: Tensor, group: ProcessGroup) -> Tensor:
    """The parts of all ranks of ``group`` behind each other: an all-gather forward, a reduce-scatter backward."""
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    whole: Tensor = gather_from_sequence_parallel_region(part, group=group)
    return whole


class PackedAttention(nn.Module):
    """Each span of a micro-batch attends to its prefix and causally to itself.

    The plan comes as ``attention_bias``, which megatron-core hands from the model down to here without a look at
    it, and which recomputation keeps as it is: a micro-batch that is computed again in backward finds its own plan,
    whatever other micro-batches a pipeline has taken up since. Under context parallelism keys and values are
    gathered over the group: one all-gather forward, one reduce-scatter backward.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.window: tuple[int, int] = tuple(config.window_size) if config.window_size else (-1, 0)
        """Keys seen to the left of a query (-1: all) and to its right."""
        self.cp_group = pg_collection.cp if pg_collection is not None else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: object = None,
        *,
        attention_bias: AttentionPlan,
        **_: object,
    ) -> Tensor:
        """Attend within the plan.

        Args:
            query: ``[T / cp, 1, heads, head_dim]``.
            key: ``[T / cp, 1, groups, head_dim]``.
            value: as ``key``.
            attention_mask: unused; part of megatron-core's interface.
            attention_bias: the plan.

        Returns:
            ``[T / cp, 1, heads * head_dim]``.
        """
        query, key, value = (states.squeeze(1) for states in (query, key, value))
        key, value = self._gather(key, value, attention_bias)
        return self.attend(query, key, value, attention_bias).reshape(query.shape[0], 1, -1)

    def _gather(self, key: Tensor, value: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        """The keys and values of all spans, ``[M, groups, head_dim]`` each."""
        if plan.keys is None:
            # Values are a view of the projection's whole output, which would be kept for backward with them.
            return key, value.contiguous()
        both = torch.cat((key, value), dim=1)
        if self.cp_group is not None and self.cp_group.size() > 1:
            both = gather_over_ranks(both, self.cp_group)
        both = _GatherKeys.apply(both, plan)  # type: ignore[no-untyped-call]  # torch's
        key, value = both.chunk(2, dim=1)
        return key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        """``[T / cp, heads, head_dim]`` from states whose spans stand one behind the other."""
        raise NotImplementedError


def lower_right_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """``[queries, keys]`` bool: causal, aligned at the last key, within a sliding window if there is one."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask if window is None else mask.triu(keys - queries - window + 1)


def _causal_mask(queries: int, keys: int, query: Tensor) -> Tensor:
    """Causal, aligned at the last key, for fewer queries than keys.

    In 16 bits a GPU gets torch's bias object, which reaches the flash kernel as an explicit mask does not. In float32
    it gets the mask: from torch 2.14 on the object hands grouped keys to a kernel that does not know groups.
    """
    if query.is_cuda and query.dtype != torch.float32:
        return causal_lower_right(queries, keys)
    return lower_right_mask(queries, keys, None, query.device)


class PackedSDPA(PackedAttention):
    """torch's scaled dot-product attention, a call a span: for CPUs, and for float32 on GPUs."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        """As the base class says."""
        spans = zip(
            query.split(plan.query_lengths), key.split(plan.key_lengths), value.split(plan.key_lengths), strict=True
        )
        with _without_cudnn(query.is_cuda):
            return torch.cat([self._attend_span(*span) for span in spans])

    def _attend_span(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # [heads, tokens, head_dim], as SDPA wants it.
        query, key, value = (states.transpose(0, 1)[None] for states in (query, key, value))
        queries, keys = query.shape[2], key.shape[2]
        causal, mask = queries == keys, None
        window = self.window[0] + 1
        if 0 < window < keys:
            causal, mask = False, lower_right_mask(queries, keys, window, query.device)
        elif not causal:
            mask = _causal_mask(queries, keys, query)
        attended = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return attended[0].transpose(0, 1)


def _without_cudnn(on_gpu: bool) -> AbstractContextManager[Any]:
    """Keep out cuDNN, which would make a plan, some 30 ms, for every new length of a span."""
    if not on_gpu:
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
