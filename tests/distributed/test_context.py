"""Attention over the context-parallel group and sums over it, with gradients, on real processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_lmpo.runtime.launch import LaunchInfo
from tests.distributed.workers import run_workers

TOKENS, HEADS, GROUPS, HEAD_DIM = 24, 4, 2, 8
SEGMENTS = [(0, 5, 0, 0), (5, 7, 0, 5), (12, 3, 0, 5), (15, 9, 0, 0)]


def states() -> list[torch.Tensor]:
    """Queries, keys, values, and what the loss does with the output."""
    generator = torch.Generator().manual_seed(3)
    counts = (HEADS, GROUPS, GROUPS, HEADS)
    return [torch.randn(TOKENS, 1, n, HEAD_DIM, generator=generator, dtype=torch.float64) for n in counts]


def on_rank(launch: LaunchInfo) -> dict[str, Any]:
    import torch.distributed as dist

    from nemo_lmpo.model.attention import PackedSDPA
    from nemo_lmpo.model.attention_plan import plan_attention
    from nemo_lmpo.parallel.context import attention_spans, local_positions, sum_over_group
    from nemo_lmpo.parallel.groups import start_process_group
    from nemo_lmpo.runtime.cpu_adapter import on_cpu

    with on_cpu():
        start_process_group(launch, use_cuda=False)
        here = {"cp_rank": launch.rank, "cp_size": launch.world_size}
        held = local_positions(TOKENS, **here)
        spans = attention_spans(torch.tensor(SEGMENTS), TOKENS, **here)
        *parts, uses = (whole[held] for whole in states())
        leaves = [part.requires_grad_() for part in parts]
        config: Any = SimpleNamespace(window_size=None)
        attention = PackedSDPA(config, 1, pg_collection=SimpleNamespace(cp=dist.group.WORLD))
        attended = attention(*leaves, attention_bias=plan_attention(spans, TOKENS, cp_size=launch.world_size))
        (attended * uses.reshape(attended.shape)).sum().backward()
        partial = torch.tensor([1.0 + launch.rank, -2.0], requires_grad=True)
        total = sum_over_group(partial, group=dist.group.WORLD)
        (total**2).sum().backward()
        dist.destroy_process_group()
    return {
        "held": held.numpy(),
        "attended": attended.detach().numpy(),
        "gradients": [leaf.grad.numpy() for leaf in leaves if leaf.grad is not None],
        "total": total.tolist(),
        "total_grad": partial.grad.tolist(),
        "partial": partial.tolist(),
    }


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_attend_as_one_and_their_gradients_add_up(world_size: int) -> None:
    (whole,) = run_workers(1, on_rank)
    for rank in run_workers(world_size, on_rank):
        held = rank["held"]
        torch.testing.assert_close(torch.from_numpy(rank["attended"]), torch.from_numpy(whole["attended"])[held])
        assert len(rank["gradients"]) == 3
        for found, expected in zip(rank["gradients"], whole["gradients"], strict=True):
            torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected)[held])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_sums_and_their_gradients(world_size: int) -> None:
    ranks = run_workers(world_size, on_rank)
    # Every rank computes the same loss of the total, total^2: the derivative of its own part is 2 total.
    first = sum(1.0 + number for number in range(world_size))
    for number, rank in enumerate(ranks):
        assert rank["total"] == [first, -2.0 * world_size]
        assert rank["total_grad"] == [2 * first, -4.0 * world_size]
        assert rank["partial"] == [1.0 + number, -2.0], "the part itself was overwritten"
