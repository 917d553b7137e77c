"""Gathering a row and summing over the context-parallel group, with gradients, on real processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_lmpo.runtime.launch import LaunchInfo
from tests.distributed.workers import run_workers

TOKENS, CHANNELS = 24, 3


def row() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(TOKENS, CHANNELS, generator=generator, dtype=torch.float64)
    # What each of up to four ranks does with the whole row.
    uses = torch.randn(4, TOKENS, CHANNELS, generator=generator, dtype=torch.float64)
    return values, uses


def on_rank(launch: LaunchInfo) -> dict[str, Any]:
    import torch.distributed as dist

    from nemo_lmpo.parallel.context import gather_row, local_positions, sum_over_group
    from nemo_lmpo.parallel.groups import start_process_group

    start_process_group(launch, use_cuda=False)
    values, uses = row()
    held = local_positions(TOKENS, cp_rank=launch.rank, cp_size=launch.world_size)
    part = values[held].requires_grad_()
    whole = gather_row(part, group=dist.group.WORLD)
    (whole * uses[launch.rank]).sum().backward()
    partial = torch.tensor([1.0 + launch.rank, -2.0], requires_grad=True)
    total = sum_over_group(partial, group=dist.group.WORLD)
    (total**2).sum().backward()
    dist.destroy_process_group()
    return {
        "held": held.numpy(),
        "whole": whole.detach().numpy(),
        "grad": part.grad.numpy(),
        "total": total.tolist(),
        "total_grad": partial.grad.tolist(),
        "partial": partial.tolist(),
    }


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_rows_meet_and_their_gradients_add_up(world_size: int) -> None:
    ranks = run_workers(world_size, on_rank)
    values, uses = row()
    gradient = uses[:world_size].sum(dim=0)
    for rank in ranks:
        assert torch.from_numpy(rank["whole"]).equal(values)
        torch.testing.assert_close(torch.from_numpy(rank["grad"]), gradient[rank["held"]])
    # Every rank computes the same loss of the total, total^2: the derivative of its own part is 2 total.
    first = sum(1.0 + number for number in range(world_size))
    for number, rank in enumerate(ranks):
        assert rank["total"] == [first, -2.0 * world_size]
        assert rank["total_grad"] == [2 * first, -4.0 * world_size]
        assert rank["partial"] == [1.0 + number, -2.0], "the part itself was overwritten"
