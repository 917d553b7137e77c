"""Transformer Engine's buffers inside of which tensor parallelism's collectives run (`model.tp_comm_overlap`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from nemo_lmpo.config.schema import ModelConfig
from nemo_lmpo.parallel.groups import ParallelGroups


@contextmanager
def communication_buffers(
    model: ModelConfig, groups: ParallelGroups, *, row_tokens: int, hidden_size: int
) -> Iterator[None]:
    """Have the buffers for a block, if the settings want them; made before the model, whose layers look for them.

    Communicates: one group for each tensor-parallel group is made over all ranks.

    Args:
        model: the settings.
        groups: of this job.
        row_tokens: length of every row of the run, all context-parallel ranks' parts together.
        hidden_size: the model's.
    """
    if not model.tp_comm_overlap:
        yield
        return
    from transformer_engine.pytorch.module import base

    if not base.tex.device_supports_multicast():  # A100, or a driver without: memory that is shared between processes
        os.environ.setdefault("UB_SKIPMC", "1")
    modes = base.UserBufferQuantizationMode
    base.initialize_ub(
        shape=[row_tokens // groups.context.size(), hidden_size],
        tp_size=groups.tensor.size(),
        quantization_modes=[modes.FP8 if model.fp8 is not None else modes.NONE],
        bootstrap_backend="nccl",
    )
    try:
        yield
    finally:
        base.destroy_ub()
