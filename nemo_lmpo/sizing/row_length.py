"""What the length of rows divides by, and so how far they are padded."""

from __future__ import annotations

import math

from nemo_lmpo.config.rules.performance import FP8_MULTIPLES
from nemo_lmpo.config.schema import Config, ModelConfig

GPU_TILE = 128
"""Lengths that matrix kernels like to work on."""


def row_multiple(model: ModelConfig, *, gpu: bool) -> int:
    """What the length of every row divides by.

    Equal parts for all ranks, whole tiles of GPUs' products, and in FP8 what its kernels take of each part: under
    sequence parallelism a rank makes FP8 numbers of its own tokens, before they are gathered.
    """
    context = model.context_parallel_size
    part = context * (model.tensor_model_parallel_size if model.sequence_parallel else 1)
    return math.lcm(
        2 * context if context > 1 else 1,
        part * (FP8_MULTIPLES[model.fp8] if model.fp8 is not None else 1),
        GPU_TILE if gpu else 1,
    )


def longest_row(config: Config, *, gpu: bool) -> int:
    """Tokens of the longest row that there can be, with its padding."""
    multiple = row_multiple(config.model, gpu=gpu)
    return -(-config.data.row_budget // multiple) * multiple
