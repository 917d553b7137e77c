"""Core attention with Transformer Engine's variable-length kernels (GPU only)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nemo_lmpo.model.attention import PackedAttention
from nemo_lmpo.model.attention_plan import AttentionPlan


class PackedTEAttention(PackedAttention):
    """All spans in one kernel of cuDNN or flash-attention, whichever Transformer Engine takes."""

    def __init__(self, config: Any, layer_number: int, **kwargs: Any) -> None:
        """Arguments as :class:`nemo_lmpo.model.attention.PackedAttention` takes them."""
        super().__init__(config, layer_number, **kwargs)
        from transformer_engine.pytorch import DotProductAttention

        tensor_parallel = config.tensor_model_parallel_size
        self.kernel = DotProductAttention(
            num_attention_heads=config.num_attention_heads // tensor_parallel,
            kv_channels=config.kv_channels,
            num_gqa_groups=config.num_query_groups // tensor_parallel,
            attention_dropout=0.0,
            qkv_format="thd",
            attn_mask_type="padding_causal_bottom_right",
            window_size=self.window,
            softmax_scale=self.softmax_scale,
            layer_number=layer_number,
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        """As the base class says."""
        attended: Tensor = self.kernel(
            query,
            key,
            value,
            cu_seqlens_q=plan.query_offsets,
            cu_seqlens_kv=plan.key_offsets,
            max_seqlen_q=plan.longest_query,
            max_seqlen_kv=plan.longest_key,
        )
        return attended
