"""How a loss sees a micro-batch: as pairs, or as single responses. Sums of log-probabilities in, values out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_lmpo.loss.interface import LossInputs, ResponseInputs, Statistics
from nemo_lmpo.loss.registry import PreferenceLoss
from nemo_lmpo.training.answer_metrics import DESIRABLE, REWARD, AnswerMetrics, answer_columns
from nemo_lmpo.training.batches import MicroBatch
from nemo_lmpo.training.example_table import ExampleTable
from nemo_lmpo.training.pair_metrics import CHOSEN_SHARED, REJECTED_SHARED, STATISTIC, PairMetrics, pair_columns
from nemo_lmpo.training.response_metrics import CORRECT, LENGTH, LOGPS, ResponseMetrics, response_columns


@dataclass(frozen=True)
class Whole:
    """What a loss has to know of the global batch."""

    mean_length: float | None = None
    """Predicted tokens of an example's first response, a mean over the examples."""
    statistics: Statistics = field(default_factory=Statistics)


class View(Protocol):
    """What a loss makes of a micro-batch."""

    shared_logps: bool
    """Whether it wants sums over the common length of a pair's responses, too."""
    correct: bool
    """Whether it wants to know which tokens are predicted right."""

    def table(self, num_examples: int, device: torch.device) -> ExampleTable:
        """An empty table for the values of a global batch."""

    def __call__(self, sums: Tensor, micro_batch: MicroBatch, whole: Whole) -> dict[str, Tensor]:
        """The values of each example ``[B]`` by the table's columns; `loss` has a gradient.

        Args:
            sums: ``[B, R]`` log-probabilities of each response; behind them ``[B, R]`` over the common length if the
                view wants these, and ``[B, R]`` right tokens if it wants those.
            micro_batch: what they are of.
            whole: of the global batch.
        """


class PairView:
    """Preference pairs."""

    correct = False

    def __init__(self, loss: PreferenceLoss, *, shared_logps: bool = False) -> None:
        """``shared_logps``: sums over the common length are taken even if the loss does not ask for them."""
        self.loss = loss
        self.shared_logps = shared_logps or loss.needs_shared_logps
        self.columns = pair_columns(loss, shared_logps=self.shared_logps)

    def table(self, num_examples: int, device: torch.device) -> PairMetrics:
        """As :meth:`View.table`."""
        return PairMetrics(self.columns, num_examples, device)

    def __call__(self, sums: Tensor, micro_batch: MicroBatch, whole: Whole) -> dict[str, Tensor]:
        """As :meth:`View.__call__`."""
        inputs = pair_inputs(sums, micro_batch, whole)
        outputs = self.loss(inputs)
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
        return {name: value for name, value in values.items() if value is not None}


def pair_inputs(logps: Tensor, micro_batch: MicroBatch, whole: Whole) -> LossInputs:
    """A loss's view of a micro-batch of pairs.

    Args:
        logps: ``[B, 2]`` sums of chosen and rejected, or ``[B, 4]`` with those over the common length behind them.
        micro_batch: with reference sums in the same order if there are any.
        whole: of the global batch.
    """
    chosen, rejected, *shared = logps.unbind(1)
    known = micro_batch.reference_logps
    reference: tuple[Any, ...] = (None,) * 4 if known is None else (*known.unbind(1), None, None)[:4]
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
        mean_chosen_length=whole.mean_length,
        statistics=whole.statistics.of_pairs(micro_batch.example_index),
    )


class ResponseView:
    """Examples of one response each: conversations."""

    shared_logps = False
    correct = True

    def __init__(self, loss: PreferenceLoss) -> None:
        self.loss = loss
        self.columns = response_columns(loss)

    def table(self, num_examples: int, device: torch.device) -> ResponseMetrics:
        """As :meth:`View.table`."""
        table = ResponseMetrics(self.columns, num_examples, device)
        table.over_tokens = self.loss.mean_over_tokens
        return table

    def __call__(self, sums: Tensor, micro_batch: MicroBatch, whole: Whole) -> dict[str, Tensor]:
        """As :meth:`View.__call__`."""
        logps, correct = sums.unbind(1)
        inputs = response_inputs(logps, micro_batch, whole)
        outputs = self.loss.of_responses(inputs)
        return {"loss": outputs.losses, LOGPS: logps, LENGTH: inputs.lengths, CORRECT: correct, **outputs.metrics}


def response_inputs(logps: Tensor, micro_batch: MicroBatch, whole: Whole) -> ResponseInputs:
    """A loss's view of a micro-batch of single responses, whose ``[B]`` sums are ``logps``."""
    known = micro_batch.reference_logps
    return ResponseInputs(
        logps,
        micro_batch.response_lengths[:, 0],
        mean_length=whole.mean_length,
        reference_logps=None if known is None else known[:, 0],
        desirable=micro_batch.desirable,
        statistics=whole.statistics.of_pairs(micro_batch.example_index),
    )


class AnswerView:
    """Examples of one answer each, which is good or bad."""

    shared_logps = False
    correct = False

    def __init__(self, loss: PreferenceLoss) -> None:
        self.loss = loss
        self.columns = answer_columns(loss)

    def table(self, num_examples: int, device: torch.device) -> AnswerMetrics:
        """As :meth:`View.table`."""
        return AnswerMetrics(self.columns, num_examples, device)

    def __call__(self, sums: Tensor, micro_batch: MicroBatch, whole: Whole) -> dict[str, Tensor]:
        """As :meth:`View.__call__`."""
        inputs = response_inputs(sums[:, 0], micro_batch, whole)
        outputs = self.loss.of_responses(inputs)
        values = {
            "loss": outputs.losses,
            LOGPS: inputs.logps,
            LENGTH: inputs.lengths,
            DESIRABLE: inputs.desirable,
            REWARD: outputs.rewards,
            **outputs.metrics,
            STATISTIC: self.loss.observe_responses(inputs),
        }
        return {name: value for name, value in values.items() if value is not None}
