"""Vocabulary-parallel log-probabilities on real processes equal the full computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_lmpo.runtime.launch import LaunchInfo
from tests.distributed.workers import run_workers

HIDDEN, VOCABULARY, POSITIONS, CHUNK = 16, 37, 23, 6
# Rows a rank; with 16 rows the last of four ranks holds padding only, and the third all but five of it.
LAYOUTS = {"tp2": (2, 24), "tp4": (4, 10), "tp4_a_rank_of_padding": (4, 16)}


def inputs(rows: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (POSITIONS,), generator=generator)
    upstream = torch.randn(POSITIONS, generator=generator, dtype=torch.float64)
    return hidden, weight, targets, upstream


def on_rank(launch: LaunchInfo, rows: int, scale: float, dtype: torch.dtype) -> dict[str, Any]:
    import torch.distributed as dist

    from nemo_lmpo.parallel.groups import start_process_group
    from nemo_lmpo.parallel.logprobs import VocabularyPart, vocab_parallel_logprobs

    start_process_group(launch, use_cuda=False)
    sent: list[int] = []

    def spy(name: str) -> None:
        original = getattr(dist, name)

        def spied(*arguments: Any, **keywords: Any) -> Any:
            tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
            sent.append(sum(tensor.numel() for tensor in tensors) if tensors else 10**9)
            return original(*arguments, **keywords)

        setattr(dist, name, spied)

    for name in dir(dist):
        if name.startswith(("all_", "reduce", "gather", "scatter", "broadcast", "send", "isend")):
            spy(name)
    hidden, weight, targets, upstream = inputs(rows * launch.world_size)
    hidden = hidden.to(dtype).requires_grad_()
    own = (weight[launch.rank * rows : (launch.rank + 1) * rows] * scale).to(dtype).requires_grad_()
    value = vocab_parallel_logprobs(
        hidden,
        own,
        targets,
        part=VocabularyPart(launch.rank * rows, VOCABULARY),
        group=dist.group.WORLD,
        chunk_tokens=CHUNK,
    )
    forward = list(sent)
    (value * upstream.float()).sum().backward()
    dist.destroy_process_group()
    tensors = {"value": value.detach(), "hidden": hidden.grad, "weight": own.grad}
    return {"forward": forward, "all": sent, **{name: tensor.float().numpy() for name, tensor in tensors.items()}}


def run(world_size: int, *arguments: Any) -> list[dict[str, Any]]:
    """Every rank's results, arrays (which outlive their process) as tensors again."""
    return [
        {name: value if isinstance(value, list) else torch.from_numpy(value) for name, value in rank.items()}
        for rank in run_workers(world_size, on_rank, *arguments)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_full_computation_and_sends_three_numbers_a_position(layout: str) -> None:
    world_size, rows = LAYOUTS[layout]
    ranks = run(world_size, rows, 1.0, torch.float32)
    hidden, weight, targets, upstream = inputs(rows * world_size)
    hidden.requires_grad_()
    real = weight[:VOCABULARY].requires_grad_()
    expected = torch.log_softmax(hidden @ real.T, dim=-1)[torch.arange(POSITIONS), targets]
    (expected * upstream).sum().backward()
    for rank in ranks:
        torch.testing.assert_close(rank["value"].double(), expected.detach(), rtol=1e-6, atol=2e-6)
        assert rank["value"].equal(ranks[0]["value"]), "ranks differ"
        # The maximum, the sum of exponentials and the target's logit: nothing grows with the vocabulary.
        assert sum(rank["forward"]) == 3 * POSITIONS
        assert rank["all"] == rank["forward"], "backward communicates"
    # A rank's share of the hidden gradient; the copy into the tensor-parallel region adds them up.
    shares = sum(rank["hidden"].double() for rank in ranks)
    torch.testing.assert_close(shares, hidden.grad, rtol=1e-5, atol=1e-5)
    whole = torch.cat([rank["weight"] for rank in ranks]).double()
    torch.testing.assert_close(whole[:VOCABULARY], real.grad, rtol=1e-5, atol=1e-5)
    assert not whole[VOCABULARY:].any()


def test_extreme_bfloat16_logits_stay_finite_on_every_rank() -> None:
    """Scaled by 1e4, logits are tens of thousands apart, also between ranks, and one rank has only padding."""
    ranks = run(4, 16, 1e4, torch.bfloat16)
    for rank in ranks:
        assert all(torch.isfinite(rank[name]).all() for name in ("value", "hidden", "weight"))
        assert (rank["value"] <= 0).all()
    hidden, weight, targets, _ = inputs(64)
    logits = hidden.bfloat16().double() @ (weight[:VOCABULARY] * 1e4).bfloat16().double().T
    expected = torch.log_softmax(logits, dim=-1)[torch.arange(POSITIONS), targets]
    # Two logits, each within 2^-8 of its size after rounding.
    assert (ranks[0]["value"].double() - expected).abs().max() < 2 * 2.0**-8 * logits.abs().max()
