"""A rank's part of a parameter that ranks share, against torch's own way to cut."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemo_lmpo.parallel.shards import gathered_dtype, is_shared, mark_shared, own_part, take_part

RANKS = 3


@pytest.fixture(params=range(RANKS))
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    """Be each rank of three, of which the others do not exist."""
    dist.init_process_group("fake", rank=request.param, world_size=RANKS, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(7, 2), (6, 2), (4, 3), (2, 5), (1,), (5,)])
def test_the_parts_are_those_that_torch_makes(rank: int, shape: tuple[int, ...]) -> None:
    whole = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(whole.clone())
    fully_shard(module, mesh=dist.init_device_mesh("cpu", (RANKS,)))
    part = own_part(module.weight)
    assert is_shared(module.weight)
    chunks = whole.chunk(RANKS)
    expected = chunks[rank] if rank < len(chunks) else whole[:0]
    assert part.local.equal(expected)
    assert whole.reshape(-1)[part.start : part.start + part.local.numel()].equal(expected.reshape(-1))
    take_part(module.weight, -whole.bfloat16())
    assert own_part(module.weight).local.equal(-expected), "in place, in the parameter's own dtype"


def test_a_parameter_of_one_rank_is_its_own_part() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    part = own_part(parameter)
    assert not is_shared(parameter)
    assert (part.start, part.local.data_ptr()) == (0, parameter.data_ptr())
    assert gathered_dtype(parameter) == torch.float32
    with pytest.raises(AssertionError):
        mark_shared(parameter, torch.bfloat16)
