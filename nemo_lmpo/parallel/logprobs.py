"""Log-probabilities of response tokens from hidden states and a vocabulary-parallel output matrix.

Logits exist only at predicting positions, a chunk at a time, and only the rank's part of the vocabulary:
neither `[tokens, vocabulary]` nor a full vocabulary row is ever whole. What is kept for backward is the
hidden states and one number a position; backward computes the logits again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabularyPart:
    """The rows ``first ... first + rows - 1`` of the padded vocabulary that a rank holds."""

    first: int
    vocab_size: int
    """Tokens of the real vocabulary; columns from here on are padding and have probability 0."""

    def hide_padding(self, logits: Tensor) -> Tensor:
        """Set the padding columns of ``[C, rows]`` logits to minus infinity, in place."""
        real = min(max(self.vocab_size - self.first, 0), logits.shape[-1])
        if real < logits.shape[-1]:
            logits[:, real:] = float("-inf")
        return logits


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _local_logits(hidden: Tensor, weight: Tensor, part: VocabularyPart) -> Tensor:
    """``[C, rows]`` float32."""
    return part.hide_padding(torch.mm(hidden, weight.t()).float())


class _VocabParallelLogprobs(torch.autograd.Function):
    """Forward: two all-reduces over the tensor-parallel group; backward: none."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        part: VocabularyPart,
        group: dist.ProcessGroup | None,
        chunk_tokens: int,
    ) -> Tensor:
        count = hidden.shape[0]
        maximum = torch.full((count,), float("-inf"), dtype=torch.float32, device=hidden.device)
        # Row 0: sum of exponentials relative to `maximum`; row 1: the target's logit, on the rank that has it.
        sums = torch.zeros((2, count), dtype=torch.float32, device=hidden.device)
        local_targets = targets - part.first
        owned = (local_targets >= 0) & (local_targets < weight.shape[0])
        safe_targets = torch.where(owned, local_targets, 0)
        for chunk in _chunks(count, chunk_tokens):
            logits = _local_logits(hidden[chunk], weight, part)
            largest = logits.max(dim=-1).values
            # A rank can hold padding only; its maximum is -inf and would turn into NaN.
            finite = torch.where(torch.isinf(largest), 0.0, largest)
            maximum[chunk] = largest
            picked = logits.gather(1, safe_targets[chunk, None]).squeeze(1)
            sums[1, chunk] = torch.where(owned[chunk], picked, 0.0)
            sums[0, chunk] = logits.sub_(finite[:, None]).exp_().sum(dim=-1)
        if group is not None and group.size() > 1:
            local_maximum = torch.where(torch.isinf(maximum), 0.0, maximum)
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
            sums[0] *= torch.exp(local_maximum - maximum)
            dist.all_reduce(sums, group=group)
        log_normaliser = maximum + sums[0].log()
        ctx.save_for_backward(hidden, weight, log_normaliser, owned, safe_targets)
        ctx.part, ctx.chunk_tokens = part, chunk_tokens
        return sums[1] - log_normaliser

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, log_normaliser, owned, safe_targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Chunks are added up in float32: in bfloat16 the sum over many chunks would lose small gradients.
        grad_weight: Tensor | None = None
        for chunk in _chunks(hidden.shape[0], ctx.chunk_tokens):
            logits = _local_logits(hidden[chunk], weight, ctx.part)
            probabilities = logits.sub_(log_normaliser[chunk, None]).exp_()
            scale = gradients[0][chunk, None].float()
            # d logprob / d logit = [target] - probability
            grad_logits = probabilities.mul_(-scale)
            grad_logits.scatter_add_(1, safe_targets[chunk, None], torch.where(owned[chunk, None], scale, 0.0))
            grad_logits = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = torch.mm(grad_logits, weight)
            if not ctx.needs_input_grad[1]:
                continue
            if grad_weight is None:
                grad_weight = torch.mm(grad_logits.t(), hidden[chunk]).float()
            elif grad_weight.dtype == grad_logits.dtype:
                grad_weight.addmm_(grad_logits.t(), hidden[chunk])
            else:
                grad_weight.add_(torch.mm(grad_logits.t(), hidden[chunk]))
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def vocab_parallel_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    part: VocabularyPart,
    group: dist.ProcessGroup | None,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Natural log-probability of each target token.

    Args:
        hidden: ``[P, hidden_size]`` states at predicting positions, the same on every rank of ``group``.
        weight: ``[rows, hidden_size]``, this rank's rows of the output matrix.
        targets: ``[P]`` int64 token ids.
        part: which rows these are, and where padding begins.
        group: tensor-parallel group; communicates: all-reduces of the maximum and of two sums, ``3 P`` floats.
        chunk_tokens: positions whose logits exist at a time.

    Returns:
        ``[P]`` float32. The gradient for ``hidden`` is this rank's share only: the caller's copy into the
        tensor-parallel region adds the shares up.
    """
    return _VocabParallelLogprobs.apply(hidden, weight, targets, part, group, chunk_tokens)
