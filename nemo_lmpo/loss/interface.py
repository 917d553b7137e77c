"""What goes into a loss and what comes out.

A loss is a pure function of :class:`LossInputs` (pairs) or of :class:`ResponseInputs` (single responses): it keeps no
state, reads no globals and communicates with nobody. Running statistics are kept by the caller
(:class:`nemo_lmpo.loss.running_statistics.RunningStatistics`) and handed in as numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Running statistics as constants for the gradient: one value for all pairs, or ``[B]`` tensors."""

    mean: float | Tensor = 0.0
    std: float | Tensor = 1.0
    """Floored, so that a division by it is safe."""
    count: int | Tensor = 0
    """What the statistics rest on: batches (`ema`) or pairs (`cumulative`) that gave a standard deviation,
    values (`batch_mean`). 0: nothing was taken yet, ``mean`` and ``std`` must not be used."""

    def of_pairs(self, index: Tensor) -> Statistics:
        """The statistics of the pairs at ``index`` ``[b]``; values that hold for all pairs stay as they are."""

        def pick(value: Any) -> Any:
            return value[index] if isinstance(value, Tensor) and value.dim() else value

        return Statistics(pick(self.mean), pick(self.std), pick(self.count))

    def to(self, device: torch.device) -> Statistics:
        """The statistics on ``device``, numbers too: a loss then copies nothing there, micro-batch for micro-batch."""
        return Statistics(**{key: torch.as_tensor(value).to(device) for key, value in vars(self).items()})


@dataclass(frozen=True)
class StatisticsConfig:
    """Which running statistics a loss wants, and when the caller must update them.

    ``kind``:
        ``ema`` (moving averages of batch mean and batch standard deviation, Eq. 21-22), ``cumulative`` (all values
        seen so far) or ``batch_mean`` (only the values of the last update).
    ``update``:
        ``after_step``: once per optimizer step with the values of the whole global batch, after its losses were
        computed with the statistics of the steps before.
        ``before_step``: before the losses, from the global batch itself, which takes a forward pass of its own.
        Every ``group_size`` pairs in the batch's order make one update, and the statistics after it are those
        of these pairs; without a size the whole batch is one group.
    """

    kind: str
    update: str
    momentum: float = 0.9
    """Weight of the past in an update (`ema`)."""
    eps: float = 1e-6
    """The standard deviation handed to losses is at least this."""
    bias_correction: bool = True
    """Divide moving averages by the weight they have gathered, as Adam does (`ema`)."""
    in_evaluation: bool = False
    """Whether validation batches update the statistics too (`before_step`)."""
    group_size: int | None = None
    """Pairs of one update (`before_step`); None: the whole global batch."""
    evaluation_group_size: int | None = None
    """The same in evaluation."""
    log_as: str | None = None
    """Prefix under which mean and deviation are logged (`lmpo`: `lmpo/mean`, `lmpo/std`); None: not at all."""


@dataclass(frozen=True)
class LossInputs:
    """``B`` preference pairs; all tensors are ``[B]`` float32 (float64 in tests).

    ``*_logps`` are sums of response-token log-probabilities in nats (``S`` in the paper), ``*_lengths`` the
    numbers of response tokens (``n``). Reference values are None for losses without a reference model.
    ``*_shared_logps`` are sums over the tokens of a response that have a counterpart in the other one, the first
    ``min(n_w, n_l)``; None for losses that do not ask for them.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    reference_chosen_logps: Tensor | None = None
    reference_rejected_logps: Tensor | None = None
    chosen_shared_logps: Tensor | None = None
    rejected_shared_logps: Tensor | None = None
    reference_chosen_shared_logps: Tensor | None = None
    reference_rejected_shared_logps: Tensor | None = None
    mean_chosen_length: float | None = None
    """Response tokens per chosen response of the whole global batch, for means over the batch's tokens."""
    statistics: Statistics = field(default_factory=Statistics)


@dataclass(frozen=True)
class ResponseInputs:
    """``B`` examples of one response each: conversations, or answers that are judged on their own.

    Tensors are as in :class:`LossInputs`; of a response only what is predicted counts.
    """

    logps: Tensor
    lengths: Tensor
    mean_length: float | None = None
    """Predicted tokens of an example of the whole global batch, for means over the batch's tokens."""
    reference_logps: Tensor | None = None
    desirable: Tensor | None = None
    """``[B]`` bool: which responses are to be learnt rather than avoided; None where nothing says so."""
    statistics: Statistics = field(default_factory=Statistics)


@dataclass(frozen=True)
class LossOutputs:
    """Per-pair values, all ``[B]``. The caller sums ``losses`` and divides by the global number of pairs.

    Only ``losses`` keep their gradient: the registry detaches the others.
    """

    losses: Tensor
    """With gradient."""
    chosen_rewards: Tensor
    """Implicit rewards."""
    rejected_rewards: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Further per-pair metrics; names as they appear in the logs (`lmpo/margin`)."""


@dataclass(frozen=True)
class ResponseOutputs:
    """Values of single responses, all ``[B]``. The caller sums ``losses`` and divides by the global number of them."""

    losses: Tensor
    """With gradient."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Further values of each response; names as they appear in the logs."""
    rewards: Tensor | None = None
    """Implicit rewards, of losses that judge answers."""
