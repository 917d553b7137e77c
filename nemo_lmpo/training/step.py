"""One pass over a step's micro-batches: the only place where parallelism and loss meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from nemo_lmpo.data.example import ANSWERS, CONVERSATIONS, PAIRS
from nemo_lmpo.loss.interface import Statistics
from nemo_lmpo.loss.registry import PreferenceLoss
from nemo_lmpo.model.packed_gpt import PackedGPTModel
from nemo_lmpo.parallel.context import sum_over_group
from nemo_lmpo.parallel.groups import ParallelGroups
from nemo_lmpo.training.batches import MicroBatch
from nemo_lmpo.training.example_table import ExampleTable
from nemo_lmpo.training.views import AnswerView, PairView, ResponseView, View, Whole

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


def forward_micro_batch(
    micro_batches: Iterator[MicroBatch], model: Any, of_hidden: Callable[..., tuple[Tensor, Tensor, dict[str, Tensor]]]
) -> tuple[Tensor, LossFunction]:
    """Forward one micro-batch through a stage, in the form that megatron-core's schedules call.

    Args:
        micro_batches: this chunk's own iterator over the step's micro-batches.
        model: the chunk, possibly wrapped for data parallelism.
        of_hidden: called on the last stage, with hidden states, `micro_batch` and the bare `model`.

    Returns:
        The stage's hidden states, and the function that the last stage calls on them.
    """
    from megatron.core.utils import unwrap_model

    micro_batch = next(micro_batches)
    hidden = model(
        micro_batch.input_ids,
        micro_batch.position_ids,
        micro_batch.attention_plan,
        **({} if micro_batch.membership is None else {"membership": micro_batch.membership}),
    )
    return hidden, partial(of_hidden, micro_batch=micro_batch, model=cast(PackedGPTModel, unwrap_model(model)))


@dataclass
class MicroBatchStep:
    """What megatron-core's schedules call for every micro-batch.

    The loss of a micro-batch is the sum over its examples divided by the examples of the whole global batch, so that
    adding up over micro-batches and ranks gives the mean over the global batch however examples are packed.
    """

    loss: PreferenceLoss
    groups: ParallelGroups
    chunk_tokens: int
    device: torch.device
    shared_logps: bool = False
    """Sums over the common length of pairs are taken even if the loss does not ask for them."""

    def __post_init__(self) -> None:
        self._views: dict[str, View] = {}
        self.whole = Whole()
        self.view = self._view_of(PAIRS)
        self.table = self.view.table(0, self.device)

    def begin(
        self,
        num_examples: int,
        *,
        kind: str = PAIRS,
        mean_length: float | None = None,
        statistics: Statistics | None = None,
    ) -> ExampleTable:
        """Start a pass over a global batch.

        Args:
            num_examples: its examples.
            kind: what they are: pairs, conversations or answers.
            mean_length: predicted tokens of an example's first response in it.
            statistics: what the losses see, one for all examples or ``[num_examples]`` tensors.

        Returns:
            The values of each example, which fill up as the pass goes.
        """
        self.view = self._view_of(kind)
        self.table = self.view.table(num_examples, self.device)
        self.whole = Whole(mean_length, (statistics or Statistics()).to(self.device))
        return self.table

    def _view_of(self, kind: str) -> View:
        make: dict[str, Callable[[], View]] = {
            PAIRS: lambda: PairView(self.loss, shared_logps=self.shared_logps),
            CONVERSATIONS: lambda: ResponseView(self.loss),
            ANSWERS: lambda: AnswerView(self.loss),
        }
        if kind not in self._views:
            self._views[kind] = make[kind]()
        return self._views[kind]

    def forward_step(self, micro_batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, LossFunction]:
        """What the schedules call: :func:`forward_micro_batch` with the loss."""
        return forward_micro_batch(micro_batches, model, self.loss_of_micro_batch)

    def loss_of_micro_batch(
        self, hidden: Tensor, *, micro_batch: MicroBatch, model: PackedGPTModel
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch from the last stage's hidden states, in megatron-core's form.

        Returns:
            The micro-batch's share of the global mean loss (scalar), a count that megatron-core wants but that nothing
            here divides by, and an empty report: the values of each example go to :attr:`table`.
        """
        logprobs, correct = model.scores(
            hidden,
            micro_batch.predict_positions,
            micro_batch.target_ids,
            chunk_tokens=self.chunk_tokens,
            correct=self.view.correct,
        )
        values = self.view(self._sums(logprobs, correct, micro_batch), micro_batch, self.whole)
        self.table.put(micro_batch.example_index, values)
        return values["loss"].sum() / len(self.table.values), micro_batch.example_count, {}

    def _sums(self, logprobs: Tensor, correct: Tensor | None, micro_batch: MicroBatch) -> Tensor:
        """Log-probabilities ``[P]`` summed per response, ``[B, R]``, and behind them what else the view wants, too.

        Communicates over the context-parallel group.
        """
        parts = [logprobs]
        if self.view.shared_logps:
            parts.append(logprobs * micro_batch.shared)
        if correct is not None:
            parts.append(correct.to(logprobs.dtype))
        index, responses = micro_batch.sequence_index, micro_batch.num_responses
        count = micro_batch.num_examples * responses
        if len(parts) > 1:
            index = torch.cat([index + number * count for number in range(len(parts))])
        sums = torch.zeros(len(parts) * count, dtype=torch.float32, device=logprobs.device)
        values = torch.cat(parts) if len(parts) > 1 else logprobs
        sums = sum_over_group(sums.index_add(0, index, values), group=self.groups.context)
        return torch.cat(sums.reshape(len(parts), -1, responses).unbind(0), dim=1)
