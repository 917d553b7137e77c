"""``compat: released_code`` against a straightforward rewriting of what the authors' trainer does each micro-batch.

The trainer (github.com/gengxuli/LMPO, commit cdfd99f, and the ablation trainers of its history) is read, not copied:
averages, exponents, margin halved and detached, statistics from zero, updated before use, ``-log(1 / (1 + h e^-d))``.
"""

from __future__ import annotations

import math
import random
import statistics as stdlib_statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from nemo_lmpo.config.loss_section import parse_loss
from nemo_lmpo.loss.interface import LossInputs
from nemo_lmpo.loss.registry import build_loss
from nemo_lmpo.loss.running_statistics import RunningStatistics

MARGINS = {
    "power5": lambda p, q: (1 - p) * (1 - (p - q) ** 5) / 2,
    "cube": lambda p, q: (1 - p) * (1 - (p - q) ** 3) / 2,
    "log": lambda p, q: (1 - p) * (math.log((0.5 - p / 2 + q / 2 + 1e-8) / (0.5 + p / 2 - q / 2 + 1e-8)) / 5 + 0.5),
    "sigmoid": lambda p, q: (1 - p) * (1 / (1 + math.exp((p - q) / 0.1))),
}


@dataclass
class ReleasedTrainer:
    beta: float
    gamma_beta_ratio: float
    lam: float
    margin: str
    mean: float = 0.0
    std: float = 0.0

    def micro_batch(self, pairs: list[tuple[float, float, int, int]]) -> list[float]:
        averages, margins = [], []
        for s_w, s_l, n_w, n_l in pairs:
            avg_w, avg_l = s_w / n_w, s_l / n_l
            middle = (n_w + n_l) / 2
            averages.append((avg_w, avg_l))
            margins.append(MARGINS[self.margin](math.exp(avg_w * middle / n_w), math.exp(avg_l * middle / n_l)))
        self.mean = self.mean * 0.9 + stdlib_statistics.fmean(margins) * (1 - 0.9)
        self.std = self.std * 0.9 + stdlib_statistics.stdev(margins) * (1 - 0.9)
        losses = []
        for (avg_w, avg_l), margin in zip(averages, margins, strict=True):
            gap = self.beta * (avg_w - avg_l) - self.lam * (margin - self.mean) / self.std
            home = math.exp(self.beta * self.gamma_beta_ratio)
            losses.append(-math.log(1 / (1 + home * math.exp(-gap))))
        return losses


def random_pairs(generator: random.Random, count: int) -> list[tuple[float, float, int, int]]:
    pairs = []
    for _ in range(count):
        n_w, n_l = generator.randint(1, 40), generator.randint(1, 40)
        pairs.append((-generator.uniform(0.1, 2) * n_w, -generator.uniform(0.1, 2) * n_l, n_w, n_l))
    return pairs


@pytest.mark.parametrize("margin", MARGINS)
def test_several_micro_batches(make_inputs: Callable[..., LossInputs], margin: str) -> None:
    generator = random.Random(11)
    trainer = ReleasedTrainer(beta=2.5, gamma_beta_ratio=0.55, lam=0.2, margin=margin)
    loss = build_loss(
        parse_loss({"compat": "released_code", "beta": 2.5, "log_h": 2.5 * 0.55, "lam": 0.2, "margin": margin})
    )
    assert loss.statistics is not None
    assert loss.statistics.update == "before_step"
    assert loss.statistics.in_evaluation
    running = RunningStatistics(loss.statistics)
    for _ in range(3):  # steps of four micro-batches of the authors' eight pairs
        pairs = random_pairs(generator, 32)
        inputs = make_inputs(*zip(*pairs, strict=True))
        outputs = loss(replace(inputs, statistics=running.update_in_groups(loss.observe(inputs))))
        expected = [value for start in range(0, 32, 8) for value in trainer.micro_batch(pairs[start : start + 8])]
        torch.testing.assert_close(outputs.losses.detach(), torch.tensor(expected, dtype=torch.float64))


def test_micro_batches_are_the_authors(make_inputs: Callable[..., LossInputs]) -> None:
    # 2 pairs a GPU in training, 4 in evaluation, gathered over 4 GPUs; an own size holds for both.
    statistics = build_loss(parse_loss({"compat": "released_code"})).statistics
    assert (statistics.group_size, statistics.evaluation_group_size) == (8, 16)
    statistics = build_loss(parse_loss({"compat": "released_code", "group_size": 4})).statistics
    assert (statistics.group_size, statistics.evaluation_group_size) == (4, 4)


@pytest.mark.parametrize("margin", MARGINS)
def test_the_margin_itself(make_inputs: Callable[..., LossInputs], margin: str) -> None:
    # The Z-score cancels any factor of the margin, so the halving shows only without it.
    pairs = random_pairs(random.Random(12), 5)
    loss = build_loss(parse_loss({"compat": "released_code", "margin": margin, "z_score": False, "lam": 0.7}))
    outputs = loss(make_inputs(*zip(*pairs, strict=True)))
    for (s_w, s_l, n_w, n_l), got, value in zip(
        pairs, outputs.metrics["lmpo/margin"].tolist(), outputs.losses.tolist(), strict=True
    ):
        middle = (n_w + n_l) / 2
        expected = MARGINS[margin](math.exp(s_w / n_w * middle / n_w), math.exp(s_l / n_l * middle / n_l))
        assert got == pytest.approx(expected, rel=1e-10)
        gap = 2.5 * (s_w / n_w - s_l / n_l) - 0.7 * expected
        assert value == pytest.approx(math.log(1 + math.exp(1.4 - gap)), rel=1e-10)


def test_no_gradient_through_the_margin(make_inputs: Callable[..., LossInputs]) -> None:
    # Without it dL/dS_w = -(1 - e^-L) beta / n_w whatever the margin does.
    loss = build_loss(parse_loss({"compat": "released_code", "lam": 1.0}))
    inputs = make_inputs([-6.0, -3.0], [-20.0, -9.0], [4.0, 3.0], [10.0, 9.0])
    running = RunningStatistics(loss.statistics)
    running.update(loss.observe(inputs))
    losses = loss(replace(inputs, statistics=running.current())).losses
    (gradient,) = torch.autograd.grad(losses.sum(), inputs.chosen_logps)
    by_hand = [-(1 - math.exp(-value)) * 2.5 / n for value, n in zip(losses.tolist(), (4.0, 3.0), strict=True)]
    assert gradient.tolist() == pytest.approx(by_hand)


def test_first_step_loss_is_as_large_as_the_uncorrected_statistics_make_it(
    make_inputs: Callable[..., LossInputs],
) -> None:
    # From zero a tenth of the mean is subtracted and a tenth of the deviation divides: mbar is about 9 a / b, here
    # margins 0.2 and 0.3 (a = 0.25, b = 0.0707): (0.2 - 0.025) / 0.00707 = 24.7 and (0.3 - 0.025) / 0.00707 = 38.9.
    running = RunningStatistics(build_loss(parse_loss({"compat": "released_code"})).statistics)
    running.update(torch.tensor([0.2, 0.3], dtype=torch.float64))
    current = running.current()
    normalized = [(m - current.mean) / current.std for m in (0.2, 0.3)]
    assert normalized == pytest.approx([24.7487, 38.8909], abs=1e-4)


def test_one_pair_does_not_poison_the_statistics(make_inputs: Callable[..., LossInputs]) -> None:
    loss = build_loss(parse_loss({"compat": "released_code"}))
    running = RunningStatistics(loss.statistics)
    one = make_inputs([-6.0], [-20.0], [4.0], [10.0])
    running.update(loss.observe(one))
    first = loss(replace(one, statistics=running.current()))
    assert first.metrics["lmpo/margin_normalized"].tolist() == [0.0]
    two = make_inputs([-6.0, -3.0], [-20.0, -9.0], [4.0, 3.0], [10.0, 9.0])
    running.update(loss.observe(two))
    running.update(loss.observe(one))
    assert torch.isfinite(loss(replace(one, statistics=running.current())).losses).all()
