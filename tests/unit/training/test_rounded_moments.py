"""AdamW with bfloat16 moments against its equations in numpy, rounded by arithmetic instead of by bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nemo_lmpo.training import rounded_moments
from nemo_lmpo.training.rounded_moments import RoundedMomentsAdamW, round_at_random

SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = ((7, 5), (11,), (40, 3))
STEPS = 5


def rounded(values: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """To the neighbor nearer to zero, or to the other if the rest and the noise together make a whole.

    bfloat16 has 8 significant bits: in [2^e, 2^(e+1)) its numbers are 2^(e-7) apart.
    """
    apart = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(values), 1e-300))) - 7)
    below, rest = np.floor(np.abs(values) / apart), np.abs(values) / apart % 1.0
    rounded: np.ndarray = np.sign(values) * (below + (np.floor(rest * 65536) + noise >= 65536)) * apart
    return rounded


class ByEquations:
    """Loshchilov and Hutter's algorithm 2 in float64, with moments as float32 makes them before they are rounded."""

    def __init__(self, weights: list[np.ndarray]) -> None:
        self.weights = weights
        self.means = [np.zeros_like(weight) for weight in weights]
        self.squares = [np.zeros_like(weight) for weight in weights]

    def step(self, number: int, gradients: list[np.ndarray], at_a_time: int) -> None:
        random = torch.Generator().manual_seed(number)
        beta1, beta2 = SETTINGS["betas"]
        batches: list[list[tuple[int, int, int]]] = [[]]
        for index, weight in enumerate(self.weights):
            for start in range(0, weight.size, at_a_time):
                run = (index, start, min(start + at_a_time, weight.size))
                if sum(stop - begin for _, begin, stop in [*batches[-1], run]) > at_a_time:
                    batches.append([])
                batches[-1].append(run)
        for index, start, stop in (run for batch in batches for run in batch):
            at = (index, slice(start, stop))
            weight, gradient = self.weights[at[0]][at[1]], gradients[at[0]][at[1]]
            mean, square = self.means[at[0]][at[1]], self.squares[at[0]][at[1]]
            weight *= 1 - SETTINGS["lr"] * SETTINGS["weight_decay"]
            mean[:] = (beta1 * mean + (1 - beta1) * gradient).astype(np.float32)
            square[:] = (beta2 * square + (1 - beta2) * gradient**2).astype(np.float32)
            root = np.sqrt(square / (1 - beta2**number)) + SETTINGS["eps"]
            weight -= SETTINGS["lr"] * mean / (1 - beta1**number) / root
            for moment in (mean, square):
                noise = torch.randint(65536, (stop - start,), generator=random, dtype=torch.int32).numpy()
                moment[:] = rounded(moment, noise)


@pytest.mark.parametrize("at_a_time", [2**24, 16])
def test_equals_the_equations(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounded_moments, "AT_A_TIME", at_a_time)
    generator = np.random.default_rng(0)
    parameters = [torch.nn.Parameter(torch.from_numpy(generator.normal(size=shape)).float()) for shape in SHAPES]
    expected = ByEquations([parameter.detach().double().numpy().reshape(-1).copy() for parameter in parameters])
    optimizer = RoundedMomentsAdamW(parameters, **SETTINGS)
    for number in range(1, STEPS + 1):
        for parameter in parameters:
            parameter.grad = torch.from_numpy(generator.normal(size=parameter.shape)).float()
        optimizer.step()
        expected.step(number, [p.grad.double().numpy().reshape(-1) for p in parameters], at_a_time)
    for index, parameter in enumerate(parameters):
        state = optimizer.state[parameter]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        # Where float32 and float64 differ by their last bit, one number in 65536 is rounded otherwise.
        assert np.array_equal(state["exp_avg"].double().numpy().reshape(-1), expected.means[index])
        assert np.array_equal(state["exp_avg_sq"].double().numpy().reshape(-1), expected.squares[index])
        np.testing.assert_allclose(parameter.detach().double().numpy().reshape(-1), expected.weights[index], rtol=1e-5)


def test_a_second_moment_fades_as_it_should_and_would_not_by_the_nearest() -> None:
    """After a thousand steps without a gradient it is 0.999^1000 of itself: each number errs, their mean does not."""
    parameter = torch.nn.Parameter(torch.zeros(4096))
    optimizer = RoundedMomentsAdamW([parameter], **SETTINGS)
    optimizer.make_moments()
    square = optimizer.state[parameter]["exp_avg_sq"].fill_(1.0)
    parameter.grad = torch.zeros_like(parameter)
    nearest = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(1000):
        optimizer.step()
        nearest = (nearest.float() * 0.999).bfloat16()
    assert nearest.item() == 1.0
    # A step rounds by at most 2^-7 relative: the mean of 4,096 walks of 1,000 steps of half of it errs by 0.2 %.
    assert float(square.float().mean()) == pytest.approx(0.999**1000, rel=0.01)


def test_rounding_keeps_what_bfloat16_has_and_what_is_not_finite() -> None:
    kept = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0**-130, torch.inf, -torch.inf, torch.nan])
    target = torch.empty(kept.shape, dtype=torch.bfloat16)
    round_at_random(kept.clone(), target, torch.Generator().manual_seed(0))
    assert torch.equal(target.float().nan_to_num(7.0), kept.nan_to_num(7.0))
