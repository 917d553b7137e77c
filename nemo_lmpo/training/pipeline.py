"""A step's micro-batches through megatron-core's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from nemo_lmpo.training.batches import MicroBatch

ForwardStep = Callable[[Iterator[MicroBatch], Any], tuple[torch.Tensor, Callable[..., Any]]]
"""What megatron-core calls for every micro-batch: see :meth:`nemo_lmpo.training.step.MicroBatchStep.forward_step`."""


def run_pipeline(
    chunks: Sequence[Any], micro_batches: list[MicroBatch], forward_step: ForwardStep, *, forward_only: bool
) -> None:
    """Forward (and backward) over the micro-batches; gradients are left in the chunks' buffers.

    Communicates: whatever the layout's schedule does, over the pipeline group and inside the layers.

    Args:
        chunks: this process's model chunks, wrapped or bare (several with a virtual pipeline).
        micro_batches: this rank's part of the step.
        forward_step: what to do with each of them.
        forward_only: without gradients.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model = list(chunks)
    iterators: list[Iterator[MicroBatch]] = [iter(micro_batches) for _ in model]
    context: AbstractContextManager[Any] = torch.no_grad() if forward_only else nullcontext()
    for chunk in model:
        chunk.train(not forward_only)
    with context:
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=model,
            num_microbatches=len(micro_batches),
            # Micro-batches bring their own length; megatron-core ignores this one.
            seq_length=max(micro_batch.input_ids.numel() for micro_batch in micro_batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )
