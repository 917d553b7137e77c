"""AdamW that keeps its moments in bfloat16: half of their memory, for every layout and every device.

The update is torch's own, in float32. Between steps a moment lies in bfloat16, rounded up or down at random, with such
probabilities that the rounding is right on average. Rounding to the nearest would lose the second moment: with a beta
of 0.999 it changes by 0.1 % a step, and bfloat16's numbers lie 0.4 % to 0.8 % apart, so that it would stand still.

megatron-core has such an optimizer too (`use_precision_aware_optimizer`). It rounds to the nearest, needs Transformer
Engine and the distributed optimizer, and makes float32 copies of all moments at a time in its step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from nemo_lmpo.parallel.shards import own_part

AT_A_TIME = 2**24
"""Elements whose moments are float32 at a time."""
_RANDOM_BITS = 2**16
"""What a float32 has below a bfloat16, whose bits are its upper half."""


@dataclass(frozen=True)
class _Piece:
    """A run of a parameter's elements: flat views."""

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class RoundedMomentsAdamW(torch.optim.Optimizer):
    """AdamW with bfloat16 moments, which are :attr:`state`'s ``exp_avg`` and ``exp_avg_sq``, as torch calls them.

    The random numbers follow from the step alone, so that a resumed run rounds as one that was never interrupted.
    Groups count their steps under ``step``; with ``fused`` set the update is torch's one kernel, which GPUs have.
    Nothing is communicated.
    """

    def __init__(self, params: Any, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        """Arguments as those of :class:`torch.optim.AdamW`; of groups that have their own values, these stand."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            group.setdefault("step", 0)
            group.setdefault("fused", False)

    def make_moments(self) -> None:
        """Make the moments that are not there yet: zeros."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    like = own_part(parameter).local
                    for name in ("exp_avg", "exp_avg_sq"):
                        self.state[parameter][name] = torch.zeros_like(like, dtype=torch.bfloat16)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of all parameters that have a gradient."""
        loss = closure() if closure is not None else None
        self.make_moments()
        for group in self.param_groups:
            group["step"] += 1
            random: dict[torch.device, torch.Generator] = {}
            for pieces in _together(self._pieces(group)):
                self._update(group, pieces, random)
        return loss

    def _pieces(self, group: dict[str, Any]) -> Iterator[_Piece]:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            parts = (own_part(parameter).local, own_part(parameter.grad).local, state["exp_avg"], state["exp_avg_sq"])
            for views in zip(*(part.view(-1).split(AT_A_TIME) for part in parts), strict=True):
                yield _Piece(*views)

    def _update(self, group: dict[str, Any], pieces: list[_Piece], random: dict[torch.device, torch.Generator]) -> None:
        means, squares = ([getattr(of, name).float() for of in pieces] for name in ("exp_avg", "exp_avg_sq"))
        adamw(
            [piece.parameter for piece in pieces],
            [piece.gradient for piece in pieces],
            means,
            squares,
            [],
            # Made where they are needed, which copies nothing from the host; the step counts on from them.
            [torch.full((), group["step"] - 1.0, device=piece.parameter.device) for piece in pieces],
            foreach=False,
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for piece, mean, square in zip(pieces, means, squares, strict=True):
            device = mean.device
            if device not in random:
                random[device] = torch.Generator(device).manual_seed(group["step"])
            round_at_random(mean, piece.exp_avg, random[device])
            round_at_random(square, piece.exp_avg_sq, random[device])


def _together(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    """Small pieces of one kind of number together, up to :data:`AT_A_TIME` elements."""
    batch: list[_Piece] = []
    size = 0
    for piece in pieces:
        if batch and size + piece.parameter.numel() > AT_A_TIME:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += piece.parameter.numel()
    if batch:
        yield batch


def round_at_random(source: Tensor, target: Tensor, random: torch.Generator) -> None:
    """Write ``source`` into ``target``, each number rounded to one of its two neighbors, the nearer one more often.

    Adding a random number below the last bit that is kept, and cutting off, does that: in float32 the bits of a number
    and its size are in the same order.

    Args:
        source: ``[n]`` float32, written over.
        target: ``[n]`` bfloat16.
        random: of the device of both.
    """
    bits = source.view(torch.int32)
    bits.add_(torch.randint(_RANDOM_BITS, bits.shape, generator=random, dtype=torch.int32, device=bits.device))
    target.view(torch.int16).copy_(bits.view(torch.int16)[1::2])  # all machines here put the lower half first
