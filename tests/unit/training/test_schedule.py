"""The learning rate against transformers' schedules."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from nemo_lmpo.config.schema import OptimConfig, ScheduleConfig
from nemo_lmpo.training.optimizer import build_scheduler

RATE = 3e-4


def our_rates(name: Any, total: int, warmup: float, min_lr: float = 0.0, resume_at: int = 0) -> list[float]:
    group: dict[str, Any] = {"lr": 0.0, "params": []}
    optimizer: Any = SimpleNamespace(param_groups=[group])
    config = OptimConfig(lr=RATE, sched=ScheduleConfig(name=name, warmup_fraction=warmup, min_lr=min_lr))
    scheduler = build_scheduler(optimizer, config, total)
    if resume_at:
        scheduler.num_steps = 0
        scheduler.step(increment=resume_at)
    rates = []
    for _ in range(resume_at, total):
        rates.append(group["lr"])
        scheduler.step(increment=1)
    return rates


def their_rates(name: str, total: int, warmup_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE)
    if name == "constant":
        schedule = get_constant_schedule_with_warmup(optimizer, warmup_steps)
    else:
        make = {"cosine": get_cosine_schedule_with_warmup, "linear": get_linear_schedule_with_warmup}[name]
        schedule = make(optimizer, warmup_steps, total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(
    ("total", "warmup", "warmup_steps"), [(467, 0.1, 47), (10, 0.0, 0), (10, 0.25, 3), (1, 0.1, 0)]
)
def test_equals_transformers(name: str, total: int, warmup: float, warmup_steps: int) -> None:
    """The warm-up is rounded up, as transformers' trainer does; a run of one step has none."""
    assert our_rates(name, total, warmup) == pytest.approx(their_rates(name, total, warmup_steps), rel=1e-12, abs=1e-20)


def test_ends_at_the_floor() -> None:
    rates = our_rates("cosine", 1001, 0.0, min_lr=1e-5)
    assert rates[0] == RATE
    assert rates[500] == pytest.approx((RATE + 1e-5) / 2, rel=0.01)
    assert 1e-5 < rates[-1] < 1.01e-5


def test_resuming_follows_the_same_curve() -> None:
    assert our_rates("cosine", 50, 0.1, resume_at=20) == our_rates("cosine", 50, 0.1)[20:]
