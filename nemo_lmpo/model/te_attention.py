"""Core attention on packed rows with Transformer Engine's variable-length kernels (GPU only)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nemo_lmpo.parallel.context import gather_row

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig


class PackedTEAttention(nn.Module):
    """All spans of a row in one kernel: lengths of queries and keys differ, masks align at the bottom right.

    The keys of a response are its prompt's followed by its own, so each prompt's keys are gathered once for the
    prompt and once in front of each response. Takes the place of :class:`nemo_lmpo.model.attention.PackedSDPA`
    and gives the same numbers.
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
        from transformer_engine.pytorch import DotProductAttention

        tensor_parallel = config.tensor_model_parallel_size
        self.cp_group = pg_collection.cp if pg_collection is not None else None
        self.kernel = DotProductAttention(
            num_attention_heads=config.num_attention_heads // tensor_parallel,
            kv_channels=config.kv_channels,
            num_gqa_groups=config.num_query_groups // tensor_parallel,
            attention_dropout=0.0,
            qkv_format="thd",
            attn_mask_type="padding_causal_bottom_right",
            window_size=config.window_size or (-1, 0),
            softmax_scale=softmax_scale,
            layer_number=layer_number,
        )

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *args: object, **kwargs: object
    ) -> Tensor:
        """Attend within the layout; arguments and result as :meth:`nemo_lmpo.model.attention.PackedSDPA.forward`."""
        if self.cp_group is not None:
            key, value = gather_row(key, group=self.cp_group), gather_row(value, group=self.cp_group)
        tokens = query.shape[0]
        spans = attention_mask.long()
        queries, keys = span_indices(spans)
        device = query.device
        query_lengths, key_lengths = spans[:, 1], spans[:, 3] + spans[:, 5]
        output = self.kernel(
            query.squeeze(1).index_select(0, queries.to(device)),
            key.squeeze(1).index_select(0, keys.to(device)),
            value.squeeze(1).index_select(0, keys.to(device)),
            cu_seqlens_q=_cumulative(query_lengths).to(device),
            cu_seqlens_kv=_cumulative(key_lengths).to(device),
            max_seqlen_q=int(query_lengths.max()),
            max_seqlen_kv=int(key_lengths.max()),
        )
        whole = output.new_zeros(tokens, output.shape[-1])
        return whole.index_copy(0, queries.to(device), output).unsqueeze(1)


def span_indices(spans: Tensor) -> tuple[Tensor, Tensor]:
    """Where the queries and the keys of all spans stand, one span behind the other.

    Args:
        spans: ``[N, 6]`` int64 (see :func:`nemo_lmpo.parallel.context.attention_spans`).

    Returns:
        Indices into the rank's part of the row (queries), and into the whole row (keys: prefix, then own).
    """
    queries = [torch.arange(start, start + length) for start, length, *_ in spans.tolist()]
    keys: list[Tensor] = []
    for _, _, prefix_start, prefix_length, own_start, own_length in spans.tolist():
        keys.append(torch.arange(prefix_start, prefix_start + prefix_length))
        keys.append(torch.arange(own_start, own_start + own_length))
    return torch.cat(queries), torch.cat(keys)


def _cumulative(lengths: Tensor) -> Tensor:
    """``[N + 1]`` int32 offsets, as the kernels want them."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
