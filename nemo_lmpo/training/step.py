"""One pass over a step's micro-batches: the only place where parallelism and loss meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from nemo_lmpo.loss.interface import LossInputs, LossOutputs, Statistics
from nemo_lmpo.loss.registry import PreferenceLoss
from nemo_lmpo.model.packed_gpt import PackedGPTModel
from nemo_lmpo.parallel.context import sum_over_group
from nemo_lmpo.parallel.groups import ParallelGroups
from nemo_lmpo.training.batches import MicroBatch
from nemo_lmpo.training.pair_metrics import CHOSEN_SHARED, REJECTED_SHARED, STATISTIC, PairMetrics, pair_columns

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


def loss_inputs(
    logps: Tensor, micro_batch: MicroBatch, *, statistics: Statistics, mean_chosen_length: float | None
) -> LossInputs:
    """The loss's view of a micro-batch.

    Args:
        logps: ``[B, 2]`` sums of chosen and rejected, or ``[B, 4]`` with those over the common length behind them.
        micro_batch: with reference sums in the same order if there are any.
        statistics: of the global batch.
        mean_chosen_length: of the global batch.
    """
    chosen, rejected, *shared = logps.unbind(1)
    known = micro_batch.reference_logps
    reference = (None,) * 4 if known is None else (*known.unbind(1), None, None)[:4]
    return LossInputs(
        chosen_logps=chosen,
        rejected_logps=rejected,
        chosen_lengths=micro_batch.response_lengths[:, 0],
        rejected_lengths=micro_batch.response_lengths[:, 1],
        reference_chosen_logps=reference[0],
        reference_rejected_logps=reference[1],
        chosen_shared_logps=shared[0] if shared else None,
        rejected_shared_logps=shared[1] if shared else None,
        reference_chosen_shared_logps=reference[2],
        reference_rejected_shared_logps=reference[3],
        mean_chosen_length=mean_chosen_length,
        statistics=statistics.of_pairs(micro_batch.pair_index),
    )


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
    hidden = model(micro_batch.input_ids, micro_batch.position_ids, micro_batch.attention_plan)
    return hidden, partial(of_hidden, micro_batch=micro_batch, model=cast(PackedGPTModel, unwrap_model(model)))


@dataclass
class MicroBatchStep:
    """What megatron-core's schedules call for every micro-batch.

    The loss of a micro-batch is the sum over its pairs divided by the pairs of the whole global batch, so that adding
    up over micro-batches and ranks gives the mean over the global batch however pairs are packed.
    """

    loss: PreferenceLoss
    groups: ParallelGroups
    chunk_tokens: int
    device: torch.device
    shared_logps: bool = False
    """Sums over the common length are taken even if the loss does not ask for them."""

    def __post_init__(self) -> None:
        self.shared_logps = self.shared_logps or self.loss.needs_shared_logps
        self.columns = pair_columns(self.loss, shared_logps=self.shared_logps)
        self.pairs = PairMetrics(self.columns, 0, self.device)
        self.mean_chosen_length: float | None = None
        self.statistics = Statistics()

    def begin(
        self, num_pairs: int, *, mean_chosen_length: float | None = None, statistics: Statistics | None = None
    ) -> PairMetrics:
        """Start a pass over a global batch.

        Args:
            num_pairs: its pairs.
            mean_chosen_length: response tokens per chosen response in it.
            statistics: what the losses see, one for all pairs or ``[num_pairs]`` tensors.

        Returns:
            The per-pair values, which fill up as the pass goes.
        """
        self.pairs = PairMetrics(self.columns, num_pairs, self.device)
        self.mean_chosen_length = mean_chosen_length
        self.statistics = (statistics or Statistics()).to(self.device)
        return self.pairs

    def forward_step(self, micro_batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, LossFunction]:
        """What the schedules call: :func:`forward_micro_batch` with the loss."""
        return forward_micro_batch(micro_batches, model, self.loss_of_micro_batch)

    def loss_of_micro_batch(
        self, hidden: Tensor, *, micro_batch: MicroBatch, model: PackedGPTModel
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch from the last stage's hidden states, in megatron-core's form.

        Returns:
            The micro-batch's share of the global mean loss (scalar), a count that megatron-core wants but that nothing
            here divides by, and an empty report: per-pair values go to :attr:`pairs`.
        """
        logprobs = model.logprobs(
            hidden, micro_batch.predict_positions, micro_batch.target_ids, chunk_tokens=self.chunk_tokens
        )
        inputs = loss_inputs(
            self._sums(logprobs, micro_batch),
            micro_batch,
            statistics=self.statistics,
            mean_chosen_length=self.mean_chosen_length,
        )
        outputs = self.loss(inputs)
        self._record(micro_batch, inputs, outputs)
        return outputs.losses.sum() / len(self.pairs.values), micro_batch.pair_count, {}

    def _sums(self, logprobs: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Log-probabilities ``[P]`` summed per response, ``[B, 2]``, or ``[B, 4]`` with those over the common length.

        Communicates over the context-parallel group.
        """
        index, values = micro_batch.sequence_index, logprobs
        pairs = micro_batch.num_pairs
        if self.shared_logps:
            index = torch.cat([index, index + 2 * pairs])
            values = torch.cat([values, values * micro_batch.shared])
        parts = 2 if self.shared_logps else 1
        sums = torch.zeros(parts * 2 * pairs, dtype=torch.float32, device=logprobs.device)
        sums = sum_over_group(sums.index_add(0, index, values), group=self.groups.context)
        return torch.cat(sums.reshape(parts, pairs, 2).unbind(0), dim=1)

    def _record(self, micro_batch: MicroBatch, inputs: LossInputs, outputs: LossOutputs) -> None:
        values = {
            "loss": outputs.losses,
            "rewards/chosen": outputs.chosen_rewards,
            "rewards/rejected": outputs.rejected_rewards,
            "logps/chosen_sum": inputs.chosen_logps,
            "logps/rejected_sum": inputs.rejected_logps,
            "lengths/chosen": inputs.chosen_lengths,
            "lengths/rejected": inputs.rejected_lengths,
            CHOSEN_SHARED: inputs.chosen_shared_logps,
            REJECTED_SHARED: inputs.rejected_shared_logps,
            **outputs.metrics,
        }
        values[STATISTIC] = self.loss.observe(inputs)
        self.pairs.put(micro_batch.pair_index, {name: value for name, value in values.items() if value is not None})
