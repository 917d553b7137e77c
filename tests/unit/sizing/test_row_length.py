"""What rows are padded to, by hand."""

from __future__ import annotations

import pytest

from nemo_lmpo.config.schema import Config, ModelConfig
from nemo_lmpo.sizing.row_length import longest_row, row_multiple


def model(tensor: int, context: int, *, sequence_parallel: bool = True, fp8: str | None = None) -> ModelConfig:
    return ModelConfig(
        tensor_model_parallel_size=tensor,
        context_parallel_size=context,
        sequence_parallel=sequence_parallel,
        fp8=fp8,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("layout", "on_cpu", "on_gpu"),
    [
        (model(1, 1), 1, 128),
        (model(8, 1), 8, 128),
        (model(8, 4), 32, 128),
        (model(2, 3), 6, 384),
        # A rank makes FP8 numbers of its own tokens: 16 of them for one scale a tensor.
        (model(8, 1, fp8="hybrid"), 128, 128),
        (model(8, 2, fp8="hybrid"), 256, 256),
        (model(8, 2, sequence_parallel=False, fp8="hybrid"), 32, 128),
        (model(1, 16, fp8="tensorwise"), 256, 256),
        # Blocks of 128 tokens, of each rank's part.
        (model(8, 1, sequence_parallel=False, fp8="blockwise"), 128, 128),
        (model(8, 2, fp8="blockwise"), 2048, 2048),
    ],
)
def test_rows_divide_into_what_each_rank_multiplies(layout: ModelConfig, on_cpu: int, on_gpu: int) -> None:
    assert (row_multiple(layout, gpu=False), row_multiple(layout, gpu=True)) == (on_cpu, on_gpu)


def test_the_longest_row_holds_the_budget() -> None:
    config = Config(model=model(8, 2, fp8="blockwise"))
    config.data.row_tokens = 5000
    assert longest_row(config, gpu=True) == 6144
    config.model.fp8 = None
    assert longest_row(config, gpu=True) == 5120
