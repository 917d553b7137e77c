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
from torch._subclasses.fake_tensor import FakeTensor


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


def local_logits(hidden: Tensor, weight: Tensor, part: VocabularyPart) -> Tensor:
    """``[C, rows]`` float32 logits of this rank's part of the vocabulary; minus infinity for padding."""
    return part.hide_padding(_product(hidden, weight.t()))


def _keeps_float32(tensor: Tensor) -> bool:
    """Whether the device's matrix kernel hands its float32 sums out, though it reads 16-bit numbers.

    Fake tensors stand for a GPU's.
    """
    return tensor.dtype in (torch.bfloat16, torch.float16) and (tensor.is_cuda or isinstance(tensor, FakeTensor))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in float32. A 16-bit logit of 16 to 32 is rounded by up to 0.06; where it can be, it is not."""
    if _keeps_float32(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right).float()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to a float32 ``total``, without a product of its own where the kernel can."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif _keeps_float32(left):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.add_(torch.mm(left, right))


def _accept_own_dtype(weight: Tensor) -> None:
    """Let a gathered weight of FSDP keep its gradient in the weight's dtype until it is reduced.

    From torch 2.15 on FSDP asks autograd for gradients in the dtype of their reduction, float32, and takes that back
    for a layer before its backward, because the reduction copies them to float32 in any case. The head's gradient comes
    before it does: without this, twice the memory would be taken until the end of backward.
    """
    if getattr(weight, "grad_dtype", None) not in (None, weight.dtype):
        weight.grad_dtype = None


class WeightGradient:
    """Where the gradient of the output matrix goes.

    megatron-core keeps a float32 gradient for every weight. The head adds to it directly: no sum of its own over
    chunks, no rounding to the weight's dtype, and no further pass that adds the result.
    """

    def __init__(self, weight: Tensor, *, used_elsewhere: bool) -> None:
        """Look for the float32 gradient.

        Args:
            weight: the output matrix.
            used_elsewhere: whether the embedding on this rank is the same weight, so that autograd brings another
                gradient of it.
        """
        self.weight = weight
        self.used_elsewhere = used_elsewhere
        main: Tensor | None = getattr(weight, "main_grad", None)
        self.is_main = main is not None
        self.total = main

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """Take in a chunk's ``grad_logits.T @ hidden``."""
        if self.total is None:
            self.total = _product(grad_logits.t(), hidden)
        else:
            _add_product(self.total, grad_logits.t(), hidden)

    def for_autograd(self) -> Tensor | None:
        """What backward returns for the weight.

        Where the sum is in its place already, autograd still has to come by: megatron-core counts the weights whose
        gradients are ready. An unused tensor makes it, unless the embedding's gradient does.
        """
        if not self.is_main:
            _accept_own_dtype(self.weight)
            return torch.zeros_like(self.weight) if self.total is None else self.total.to(self.weight.dtype)
        if self.used_elsewhere:
            return None
        self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return torch.empty_like(self.weight)


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
        used_elsewhere: bool,
        correct: bool,
    ) -> tuple[Tensor, Tensor | None]:
        count = hidden.shape[0]
        maximum = torch.full((count,), float("-inf"), dtype=torch.float32, device=hidden.device)
        # Row 0: sum of exponentials relative to `maximum`; row 1: the target's logit, on the rank that has it.
        sums = torch.zeros((2, count), dtype=torch.float32, device=hidden.device)
        local_targets = targets - part.first
        owned = (local_targets >= 0) & (local_targets < weight.shape[0])
        safe_targets = torch.where(owned, local_targets, 0)
        for chunk in _chunks(count, chunk_tokens):
            logits = local_logits(hidden[chunk], weight, part)
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
        ctx.part, ctx.chunk_tokens, ctx.used_elsewhere = part, chunk_tokens, used_elsewhere
        ctx.output_weight = weight  # itself: what is saved comes back without its float32 gradient
        if not correct:
            return sums[1] - log_normaliser, None
        most_probable = sums[1] >= maximum
        ctx.mark_non_differentiable(most_probable)
        return sums[1] - log_normaliser, most_probable

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, log_normaliser, owned, safe_targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Chunks are added up in float32: in bfloat16 the sum over many chunks would lose small gradients.
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = WeightGradient(ctx.output_weight, used_elsewhere=ctx.used_elsewhere)
        for chunk in _chunks(hidden.shape[0], ctx.chunk_tokens):
            logits = local_logits(hidden[chunk], weight, ctx.part)
            probabilities = logits.sub_(log_normaliser[chunk, None]).exp_()
            scale = gradients[0][chunk, None].float()
            # d logprob / d logit = [target] - probability
            grad_logits = probabilities.mul_(-scale)
            grad_logits.scatter_add_(1, safe_targets[chunk, None], torch.where(owned[chunk, None], scale, 0.0))
            grad_logits = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = torch.mm(grad_logits, weight)
            if grad_weight is not None:
                grad_weight.add(grad_logits, hidden[chunk])
        of_weight = grad_weight.for_autograd() if grad_weight is not None else None
        return grad_hidden, of_weight, None, None, None, None, None, None


def vocab_parallel_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    part: VocabularyPart,
    group: dist.ProcessGroup | None,
    chunk_tokens: int = 1024,
    used_elsewhere: bool = False,
) -> Tensor:
    """The first of :func:`vocab_parallel_scores`, which has the same arguments."""
    return vocab_parallel_scores(
        hidden,
        weight,
        targets,
        part=part,
        group=group,
        chunk_tokens=chunk_tokens,
        used_elsewhere=used_elsewhere,
        correct=False,
    )[0]


def vocab_parallel_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    part: VocabularyPart,
    group: dist.ProcessGroup | None,
    chunk_tokens: int,
    used_elsewhere: bool,
    correct: bool,
) -> tuple[Tensor, Tensor | None]:
    """Natural log-probability of each target token, and whether no other token is more probable.

    Args:
        hidden: ``[P, hidden_size]`` states at predicting positions, the same on every rank of ``group``.
        weight: ``[rows, hidden_size]``, this rank's rows of the output matrix.
        targets: ``[P]`` int64 token ids.
        part: which rows these are, and where padding begins.
        group: tensor-parallel group; communicates: all-reduces of the maximum and of two sums, ``3 P`` floats.
        chunk_tokens: positions whose logits exist at a time.
        used_elsewhere: whether this rank's embedding is the same weight.
        correct: whether to tell which targets are the most probable tokens.

    Returns:
        ``[P]`` float32, and ``[P]`` bool if that is asked for. The gradient for ``hidden`` is this rank's share only:
        the caller's copy into the tensor-parallel region adds the shares up.
    """
    found: tuple[Tensor, Tensor | None] = _VocabParallelLogprobs.apply(  # type: ignore[no-untyped-call]  # torch's
        hidden, weight, targets, part, group, chunk_tokens, used_elsewhere, correct
    )
    return found
