"""The meter against amounts that can be counted by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from nemo_lmpo.sizing.work import Product
from nemo_lmpo.trace.meter import Meter
from nemo_lmpo.trace.world import fake_world, measured

KILO = 1000


@pytest.fixture
def meter() -> Iterator[Meter]:
    """Rank 1 of four processes that do not exist."""
    with fake_world(4, 1):
        found = Meter()
        with measured(found, transformer_engine=True):
            yield found


def test_memory_is_what_is_alive(meter: Meter) -> None:
    first = torch.empty(KILO)
    assert (meter.now, meter.peak) == (4 * KILO, 4 * KILO)
    view = first.view(10, 100)
    assert meter.now == 4 * KILO, "a view is not a memory of its own"
    second = torch.empty(KILO, dtype=torch.bfloat16)
    del second
    assert (meter.now, meter.peak) == (4 * KILO, 6 * KILO)
    del first
    assert meter.now == 4 * KILO, "the view holds it"
    del view
    assert meter.now == 0
    meter.restart_peak()
    assert meter.peak == 0


def test_a_size_that_no_machine_has(meter: Meter) -> None:
    weight = torch.empty(10**6, 10**6, dtype=torch.bfloat16)
    assert meter.now == 2 * 10**12
    assert weight.shape == (10**6, 10**6)


def test_products_forward_and_backward(meter: Meter) -> None:
    """[3, 5] x [5, 7]: the product, then its input's gradient [3, 7] x [7, 5] and its weight's [5, 3] x [3, 7]."""
    hidden = torch.empty(3, 5, requires_grad=True)
    weight = torch.empty(5, 7, requires_grad=True)
    (hidden @ weight).backward(torch.empty(3, 7))
    assert meter.work.products == {Product(3, 7, 5): 1, Product(3, 5, 7): 1, Product(5, 7, 3): 1}
    assert meter.work.flops == 3 * 2 * 3 * 5 * 7
    assert meter.work.kernels["mm"] == 3


def test_a_fused_region_is_one_kernel_and_keeps_what_it_returns(meter: Meter) -> None:
    states = torch.empty(KILO)
    before = meter.now
    with meter.fused("swish", states):
        result = states * torch.sigmoid(states)
    assert meter.work.kernels == {"swish": 1}
    assert meter.now - before == 4 * KILO
    assert meter.peak == meter.now, "what lies between is in registers"
    assert meter.work.moved["swish"] == 8 * KILO, "one reading, one writing"
    del result
    assert meter.now == before


def test_bytes_that_a_rank_sends(meter: Meter) -> None:
    """In a ring of 4 each rank sends 3/4 of the whole; an all-reduce is a reduce-scatter and an all-gather.

    In an all-to-all it keeps a quarter of what it has.
    """
    part, whole = torch.empty(KILO), torch.empty(4 * KILO)
    dist.all_reduce(whole)
    dist.all_gather_into_tensor(whole, part)
    dist.reduce_scatter_tensor(part, whole)
    dist.all_to_all_single(torch.empty(4 * KILO), whole)
    sent = {kind: number for (kind, _), number in meter.work.sent.items()}
    wanted = {"all-reduce": 2 * 12 * KILO, "all-gather": 12 * KILO, "reduce-scatter": 12 * KILO}
    assert sent == {**wanted, "all-to-all": 12 * KILO}
    assert set(meter.work.calls.values()) == {1}


def test_coalesced_collectives_count_each_tensor(meter: Meter) -> None:
    parts = [torch.empty(KILO), torch.empty(3 * KILO)]
    with dist._coalescing_manager(async_ops=True) as manager:
        for part in parts:
            dist.all_reduce(part, async_op=True)
    manager.wait()
    assert sum(meter.work.sent.values()) == 2 * 4 * 4 * KILO * 3 // 4


def test_a_value_that_the_host_reads(meter: Meter) -> None:
    assert float(torch.empty(3).sum()) == 1.0
    assert torch.empty(3, dtype=torch.bool).any().item() is True
    assert meter.work.host_reads == 2


def test_everything_is_put_back() -> None:
    new_group, to = dist.new_group, torch.nn.Module.to
    with fake_world(2, 0), measured(Meter(), transformer_engine=False):
        assert torch.nn.Module.to is not to
    assert (dist.new_group, torch.nn.Module.to) == (new_group, to)
    assert not dist.is_initialized()
