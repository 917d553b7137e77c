"""How many kernels one attention layer launches on a GPU, counted on fake tensors of Llama-3-8B's shape at TP 4."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nemo_lmpo.data.example import Example
from nemo_lmpo.data.pack import pack_examples
from nemo_lmpo.model import flash_attention
from nemo_lmpo.model.attention_plan import plan_attention
from nemo_lmpo.model.flash_attention import PackedFlashAttention
from nemo_lmpo.parallel.context import attention_spans
from tests.kernel_count import of_attention


@pytest.mark.parametrize("kernel", [flash_attention.public_kernel, flash_attention.operator_kernel])
@pytest.mark.parametrize("window", [None, (1023, 0)])
def test_at_most_25_for_any_number_of_pairs(kernel: Any, window: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention, "flash_kernel", lambda: kernel)
    config: Any = SimpleNamespace(window_size=window)
    counts = []
    for number in (1, 8, 32):
        pairs = [Example.pair(str(i), [1] * 150, [2] * 190, [3] * 170) for i in range(number)]
        sequence = pack_examples(pairs, range(number), share_prompt=True, pad_to_multiple=128)
        tokens = sequence.num_tokens
        spans = attention_spans(sequence.segments, tokens, cp_rank=0, cp_size=1)
        plan = plan_attention(spans, tokens, cp_size=1)
        counts.append(of_attention(PackedFlashAttention(config, 1), plan, tokens, heads=8, groups=2))
    assert counts[0] == counts[1] == counts[2]
    assert 8 <= counts[0].total() <= 25, counts[0]
