"""The layouts that docs/mixtures.md shows are executed on fake tensors, all layers of a rank: minutes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.formats.architecture import architecture_from_hf
from nemo_lmpo.sizing.cards import read_gpus
from nemo_lmpo.sizing.flops import shape_of
from nemo_lmpo.sizing.rank_work import attention_flops, split_of
from nemo_lmpo.sizing.search import rank_layouts
from nemo_lmpo.sizing.step_time import counted, micro_batch_time
from nemo_lmpo.trace.run import trace_rank


@pytest.mark.parametrize("recipe", ["lmpo_mixtral_8x7b", "lmpo_qwen3_30b_a3b"])
def test_the_fastest_layout_is_what_the_plan_says(recipe: str) -> None:
    """Memory within 5 %; a micro-batch of the last stage within 10 % of the planned time."""
    config, machine = load_recipe(recipe, []), read_gpus("64xH100")
    assert config.model.architecture is not None
    best = rank_layouts(config, architecture_from_hf(config.model.architecture), machine)[0]
    layout = best.layout
    stages = layout.config.model.pipeline_model_parallel_size
    traces = [
        trace_rank(layout, rank, transformer_engine=True) for rank in (0, layout.world_size // stages * (stages - 1))
    ]
    peak = max(trace.peak for trace in traces)
    print(f"{recipe}: {layout}; {peak / 2**30:.2f} GiB executed, {best.memory / 2**30:.2f} planned")
    assert best.memory == pytest.approx(peak, rel=0.05)

    shape, split, row = shape_of(layout.architecture), replace(split_of(layout), fused=True), traces[-1].row
    attention = attention_flops(shape, split, row)
    executed = micro_batch_time(traces[-1].micro_batch, attention, split, machine.card)
    planned = counted(shape, split, row, machine.card, last=True)
    print(f"a micro-batch: {executed.total * 1e3:.2f} ms executed, {planned.total * 1e3:.2f} ms planned")
    assert planned.total == pytest.approx(executed.total, rel=0.1)
