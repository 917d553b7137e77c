"""What goes into a preference loss and what comes out.

A loss is a pure function of :class:`LossInputs`: it keeps no state, reads no globals and communicates with
nobody. Running statistics are kept by the caller and handed in as numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Running statistics as constants for the gradient; ``count`` 0 means that none were taken yet."""

    mean: float = 0.0
    std: float = 1.0
    count: int = 0


@dataclass(frozen=True)
class LossInputs:
    """``B`` preference pairs; all tensors are ``[B]`` float32 (float64 in tests).

    ``*_logps`` are sums of response-token log-probabilities in nats (``S`` in the paper), ``*_lengths`` the
    numbers of response tokens (``n``). Reference values are None for losses without a reference model.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    reference_chosen_logps: Tensor | None = None
    reference_rejected_logps: Tensor | None = None
    statistics: Statistics = field(default_factory=Statistics)


@dataclass(frozen=True)
class LossOutputs:
    """Per-pair values, all ``[B]``. The caller sums ``losses`` and divides by the global number of pairs."""

    losses: Tensor
    """With gradient."""
    chosen_rewards: Tensor
    """Implicit rewards, detached."""
    rejected_rewards: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Further per-pair metrics, detached; names as they appear in the logs (`lmpo/margin`)."""


class PreferenceLoss(Protocol):
    """A configured loss."""

    needs_reference: bool
    """Whether ``reference_*_logps`` must be given."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """Per-pair losses and metrics."""
        ...

    def observe(self, inputs: LossInputs) -> Tensor | None:
        """Detached ``[B]`` values that feed running statistics, or None for a loss that keeps none."""
        ...
