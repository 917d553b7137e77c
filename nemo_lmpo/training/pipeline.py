"""A step's micro-batches through megatron-core's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from nemo_lmpo.model.fully_sharded import release_gathered
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

    Raises:
        ValueError: micro-batches of different lengths for a pipeline, whose stages exchange one shape.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    model = list(chunks)
    iterators: list[Iterator[MicroBatch]] = [iter(micro_batches) for _ in model]
    context: AbstractContextManager[Any] = torch.no_grad() if forward_only else nullcontext()
    for chunk in model:
        chunk.train(not forward_only)
    layout = get_model_config(model[0])
    lengths = {micro_batch.input_ids.numel() for micro_batch in micro_batches}
    if len(lengths) > 1 and layout.pipeline_model_parallel_size > 1:
        raise ValueError(f"the micro-batches of a step through a pipeline have several lengths: {sorted(lengths)}")
    with context:
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=model,
            num_microbatches=len(micro_batches),
            # Of the whole sequence; a rank holds its context-parallel part.
            seq_length=max(lengths) * layout.context_parallel_size,
            micro_batch_size=1,
            forward_only=forward_only,
        )
    if forward_only:
        release_gathered(model)
