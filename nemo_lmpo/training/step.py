"""One pass over a step's micro-batches: the only place where parallelism and loss meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_lmpo.loss.interface import LossInputs, LossOutputs, PreferenceLoss
from nemo_lmpo.loss.running_statistics import RunningStatistics
from nemo_lmpo.model.packed_gpt import PackedGPTModel
from nemo_lmpo.parallel.context import sum_over_group
from nemo_lmpo.parallel.groups import ParallelGroups
from nemo_lmpo.training.batches import MicroBatch
from nemo_lmpo.training.pair_metrics import STATISTIC, PairMetrics, pair_columns

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


def loss_inputs(sums: Tensor, micro_batch: MicroBatch, statistics: RunningStatistics | None) -> LossInputs:
    """The loss's view of a micro-batch; ``sums`` is ``[2 B]``, chosen and rejected in turn."""
    reference = micro_batch.reference_logps
    inputs = LossInputs(
        chosen_logps=sums[0::2],
        rejected_logps=sums[1::2],
        chosen_lengths=micro_batch.response_lengths[:, 0],
        rejected_lengths=micro_batch.response_lengths[:, 1],
        reference_chosen_logps=None if reference is None else reference[:, 0],
        reference_rejected_logps=None if reference is None else reference[:, 1],
    )
    if statistics is None:
        return inputs
    return LossInputs(**{**vars(inputs), "statistics": statistics.current()})


class MicroBatchStep:
    """What megatron-core's schedules call for every micro-batch.

    The loss of a micro-batch is the sum over its pairs divided by the pairs of the whole global batch, so that adding
    up over micro-batches and ranks gives the mean over the global batch however pairs are packed.
    """

    def __init__(
        self,
        loss: PreferenceLoss,
        statistics: RunningStatistics | None,
        groups: ParallelGroups,
        *,
        chunk_tokens: int,
        device: torch.device,
    ) -> None:
        self.loss = loss
        self.statistics = statistics
        self.groups = groups
        self.chunk_tokens = chunk_tokens
        self.device = device
        self.columns = pair_columns(loss)
        self.pairs = PairMetrics(self.columns, 0, device)
        self.global_pairs = 0
        self.training = True

    def begin(self, num_pairs: int, *, training: bool) -> PairMetrics:
        """Start a pass over a global batch of ``num_pairs``; the returned values fill up as it goes."""
        self.pairs = PairMetrics(self.columns, num_pairs, self.device)
        self.global_pairs = num_pairs
        self.training = training
        return self.pairs

    def forward_step(self, micro_batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, LossFunction]:
        """Forward one micro-batch through this stage.

        Args:
            micro_batches: this chunk's own iterator over the step's micro-batches.
            model: the chunk, possibly wrapped for data parallelism.

        Returns:
            The stage's hidden states, and the function that the last stage calls on them.
        """
        from megatron.core.utils import unwrap_model

        micro_batch = next(micro_batches)
        hidden = model(micro_batch.input_ids, micro_batch.position_ids, micro_batch.attention_plan)
        return hidden, partial(
            self.loss_of_micro_batch, micro_batch=micro_batch, model=cast(PackedGPTModel, unwrap_model(model))
        )

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
        sums = torch.zeros(2 * micro_batch.num_pairs, dtype=torch.float32, device=logprobs.device)
        sums = sums.index_add(0, micro_batch.sequence_index, logprobs)
        sums = sum_over_group(sums, group=self.groups.context)
        self._update_before_micro_batch(sums, micro_batch)
        inputs = loss_inputs(sums, micro_batch, self.statistics)
        outputs = self.loss(inputs)
        self._record(micro_batch, inputs, outputs)
        count = torch.tensor(micro_batch.num_pairs, dtype=torch.int, device=logprobs.device)
        return outputs.losses.sum() / self.global_pairs, count, {}

    def _update_before_micro_batch(self, sums: Tensor, micro_batch: MicroBatch) -> None:
        """The released code's order: statistics of this micro-batch of all data-parallel ranks, before its losses.

        Communicates over the data-parallel group: two all-gathers. All ranks have equally many micro-batches.
        """
        if self.statistics is None or self.statistics.config.update != "before_micro_batch":
            return
        if not self.training and not self.statistics.config.in_evaluation:
            return
        observed = self.loss.observe(loss_inputs(sums, micro_batch, self.statistics))
        assert observed is not None, "a loss with statistics observes"
        self.statistics.update(gather_uneven(observed.detach(), self.groups.data))

    def _record(self, micro_batch: MicroBatch, inputs: LossInputs, outputs: LossOutputs) -> None:
        values = {
            "loss": outputs.losses,
            "rewards/chosen": outputs.chosen_rewards,
            "rewards/rejected": outputs.rejected_rewards,
            "logps/chosen_sum": inputs.chosen_logps,
            "logps/rejected_sum": inputs.rejected_logps,
            "lengths/chosen": inputs.chosen_lengths,
            "lengths/rejected": inputs.rejected_lengths,
            **outputs.metrics,
        }
        observed = self.loss.observe(inputs)
        if observed is not None:
            values[STATISTIC] = observed
        self.pairs.put(micro_batch.pair_index, values)


def gather_uneven(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """1-D tensors of different lengths from all ranks of ``group``, one behind the other; two all-gathers."""
    if group.size() == 1:
        return values
    lengths = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(group.size())]
    dist.all_gather(lengths, torch.tensor([values.numel()], device=values.device), group=group)
    counts = [int(length) for length in lengths]
    padded = values.new_zeros(max([*counts, 1]))
    padded[: values.numel()] = values
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
