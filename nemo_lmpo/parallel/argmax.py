"""The most probable token from hidden states and a vocabulary-parallel output matrix."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_lmpo.parallel.logprobs import VocabularyPart, local_logits

NO_TOKEN = torch.iinfo(torch.int64).max
"""What a rank proposes that does not hold the largest logit."""


def vocab_parallel_argmax(
    hidden: Tensor, weight: Tensor, *, part: VocabularyPart, group: dist.ProcessGroup | None
) -> Tensor:
    """The token with the largest logit at each position; of equal ones the lowest id, whatever the layout.

    Where no logit is a number, the answer is a token of the first rank's part, the same on every rank.

    Args:
        hidden: ``[P, hidden_size]`` states, the same on every rank of ``group``.
        weight: ``[rows, hidden_size]``, this rank's rows of the output matrix.
        part: which rows these are, and where padding begins.
        group: tensor-parallel group; communicates: all-reduces of the largest logits and of the ids, ``2 P`` numbers.

    Returns:
        ``[P]`` int64 token ids, the same on every rank of ``group``.
    """
    logits = local_logits(hidden, weight, part)
    logits.masked_fill_(logits.isnan(), float("-inf"))  # no order has a place for them
    place = logits.argmax(dim=-1)  # the first of equal ones
    own = logits.gather(1, place[:, None]).squeeze(1)
    tokens = place + part.first
    if group is None or group.size() == 1:
        return tokens
    largest = own.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    tokens = torch.where(own >= largest, tokens, NO_TOKEN)
    dist.all_reduce(tokens, op=dist.ReduceOp.MIN, group=group)
    return tokens
