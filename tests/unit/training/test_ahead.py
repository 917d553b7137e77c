"""Batches that are built ahead: the same ones, in turn, with errors where they belong."""

from __future__ import annotations

import threading
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.data.example import Example
from nemo_lmpo.errors import DataError
from nemo_lmpo.training.ahead import BatchesAhead
from nemo_lmpo.training.batches import BatchBuilder, StepBatch, copy_together

CPU = torch.device("cpu")


class Pairs:
    """Pairs of growing length; notes which thread asks for them."""

    def __init__(self, count: int) -> None:
        self.lengths = np.array([[3 + i % 7, 2 + i % 5, 2 + i % 11] for i in range(count)])
        self.threads: set[str] = set()

    num_responses = 2
    mismatched = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        self.threads.add(threading.current_thread().name)
        prompt, chosen, rejected = (list(range(1, 1 + int(length))) for length in self.lengths[index])
        return Example.pair(str(index), prompt, chosen, rejected, -1.0, -2.0)


def builder(pipeline: int = 1, **data: Any) -> BatchBuilder:
    config = load_recipe("lmpo_tiny", [])
    config.data = replace(config.data, row_tokens=40, **data)
    one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    stages = SimpleNamespace(size=lambda: pipeline, rank=lambda: 0)
    groups: Any = SimpleNamespace(tensor=one, context=one, data=one, pipeline=stages)
    return BatchBuilder(config, groups, device=CPU, pad_id=0)


def tensors(batch: StepBatch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def collect(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    for micro_batch in batch.micro_batches:
        micro_batch.map(collect)
    return found


def assert_same(found: StepBatch, expected: StepBatch) -> None:
    assert found.example_ids == expected.example_ids
    ours, theirs = tensors(found), tensors(expected)
    assert len(ours) == len(theirs) > 10
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        assert torch.equal(our, their)


def test_each_batch_in_turn_and_after_a_jump() -> None:
    pairs, steps = Pairs(40), np.arange(40).reshape(5, 8)
    ahead = BatchesAhead(builder(), pairs, steps.__getitem__, len(steps))
    for number in (2, 3, 4, 0, 1):
        assert_same(ahead.get(number), builder().build(Pairs(40), steps[number]))
    assert not any("Main" in name for name in pairs.threads)
    ahead.close()


def test_ends_its_thread() -> None:
    pairs, steps = Pairs(16), np.arange(16).reshape(4, 4)
    before = threading.active_count()
    with closing(BatchesAhead(builder(), pairs, steps.__getitem__, len(steps))) as ahead:
        assert [ahead.get(number).example_ids[0] for number in range(4)] == ["0", "4", "8", "12"]
    assert threading.active_count() == before


def test_the_next_batch_is_there_before_it_is_asked_for() -> None:
    pairs, steps = Pairs(16), np.arange(16).reshape(4, 4)
    ahead = BatchesAhead(builder(), pairs, steps.__getitem__, len(steps))
    ahead.get(0)
    ahead.wait()
    assert ahead._coming is not None
    assert ahead._coming[0] == 1
    assert ahead._coming[1].done()
    ahead.close()


def test_an_error_comes_with_its_own_batch() -> None:
    pairs, steps = Pairs(16), np.arange(16).reshape(4, 4)
    pairs.lengths[5] = [30, 30, 30]
    ahead = BatchesAhead(builder(), pairs, steps.__getitem__, len(steps))
    ahead.get(0)
    ahead.wait()
    with pytest.raises(DataError, match="takes 88 tokens"):
        ahead.get(1)
    assert ahead.get(2).example_ids[0] == "8"
    ahead.close()


def test_copied_together_is_copied() -> None:
    """Through another device: meta holds no values, but shapes and dtypes show the way back."""
    batch = builder().build(Pairs(8), np.arange(8))
    for found, tensor in zip(copy_together(tensors(batch), CPU), tensors(batch), strict=True):
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
        assert found.data_ptr() != tensor.data_ptr() or not tensor.numel()
    meta = batch.to(torch.device("meta"))
    assert all(tensor.device.type == "meta" for tensor in tensors(meta))
    assert [tensor.shape for tensor in tensors(meta)] == [tensor.shape for tensor in tensors(batch)]


def test_one_length_a_step_through_a_pipeline() -> None:
    pairs, indices = Pairs(32), np.arange(32)
    plain, piped = builder().build(pairs, indices), builder(pipeline=2).build(pairs, indices)
    lengths = [micro_batch.input_ids.numel() for micro_batch in plain.micro_batches]
    assert len(set(lengths)) > 1
    assert {micro_batch.input_ids.numel() for micro_batch in piped.micro_batches} == {max(lengths)}
    assert plain.tokens == piped.tokens
