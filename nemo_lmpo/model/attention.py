"""Core attention on packed rows with torch's scaled dot-product attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from nemo_lmpo.parallel.context import gather_row

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig


def lower_right_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """``[queries, keys]`` bool: causal, aligned at the last key, within a sliding window if there is one."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask if window is None else mask.triu(keys - queries - window + 1)


class PackedSDPA(nn.Module):
    """Each segment of the row attends to its prefix and causally to itself, in one call a span.

    ``attention_mask`` carries the layout: ``[N, 6]`` int32 attention spans on the CPU (see
    :func:`nemo_lmpo.parallel.context.attention_spans`). A tensor, because megatron-core saves it when it
    recomputes activations. Tokens in no span (padding) get zeros. Under context parallelism keys and values
    are gathered over the group.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.window = config.window_size[0] + 1 if config.window_size else None
        self.cp_group = pg_collection.cp if pg_collection is not None else None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *args: object, **kwargs: object
    ) -> Tensor:
        """Attend within the layout.

        Args:
            query: ``[T / cp, 1, heads, head_dim]``.
            key: ``[T / cp, 1, groups, head_dim]``.
            value: as ``key``.
            attention_mask: the spans.
            args: megatron-core's further arguments, which the layout makes superfluous.
            kwargs: likewise.

        Returns:
            ``[T / cp, 1, heads * head_dim]``.
        """
        if self.cp_group is not None:
            key, value = gather_row(key, group=self.cp_group), gather_row(value, group=self.cp_group)
        # Values are a view of the projection's whole output, which would be kept for backward with them.
        value = value.contiguous()
        # [heads, T, head_dim], as SDPA wants it.
        query, key, value = (states.squeeze(1).transpose(0, 1) for states in (query, key, value))
        heads, tokens, head_dim = query.shape
        runs: list[Tensor] = []
        filled = 0
        for start, length, prefix_start, prefix_length, own_start, own_length in attention_mask.tolist():
            if start > filled:
                runs.append(query.new_zeros(heads, start - filled, head_dim))
            own = slice(own_start, own_start + own_length)
            keys, values = key[:, own], value[:, own]
            if prefix_length:
                prefix = slice(prefix_start, prefix_start + prefix_length)
                keys, values = torch.cat((key[:, prefix], keys), 1), torch.cat((value[:, prefix], values), 1)
            runs.append(self._attend(query[:, start : start + length], keys, values))
            filled = start + length
        if filled < tokens:
            runs.append(query.new_zeros(heads, tokens - filled, head_dim))
        return torch.cat(runs, dim=1).transpose(0, 1).reshape(tokens, 1, heads * head_dim)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        queries, keys = query.shape[1], key.shape[1]
        causal, mask = queries == keys, None
        if self.window is not None and keys > self.window:
            causal, mask = False, lower_right_mask(queries, keys, self.window, query.device)
        elif not causal:
            # The bias object reaches the flash kernel on GPUs, which an explicit mask does not.
            on_gpu = query.is_cuda
            mask = causal_lower_right(queries, keys) if on_gpu else lower_right_mask(queries, keys, None, query.device)
        return scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=mask,
            is_causal=causal,
            scale=self.softmax_scale,
            enable_gqa=query.shape[0] != key.shape[0],
        )[0]
