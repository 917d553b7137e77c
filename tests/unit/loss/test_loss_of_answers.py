"""KTO on single answers with a label: against the paper's formula in plain floats, TRL, and KTO on pairs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nemo_lmpo.config.loss_section import parse_loss
from nemo_lmpo.loss.balance import weights_advice
from nemo_lmpo.loss.interface import LossInputs, ResponseInputs, Statistics
from nemo_lmpo.loss.options import KTOConfig
from nemo_lmpo.loss.registry import build_loss
from nemo_lmpo.loss.running_statistics import RunningStatistics
from nemo_lmpo.training.answer_metrics import AnswerMetrics, answer_columns

LOGPS = torch.tensor([-12.0, -30.5, -4.25, -80.0, -7.0], dtype=torch.float64)
REFERENCE = torch.tensor([-10.0, -33.0, -4.0, -60.0, -9.5], dtype=torch.float64)
LABELS = torch.tensor([True, True, False, False, False])
LENGTHS = torch.tensor([5.0, 9.0, 2.0, 20.0, 3.0], dtype=torch.float64)
OPTIONS = {"name": "kto", "beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.6}


def inputs(mean: float = 0.0, count: int = 1, logps: torch.Tensor = LOGPS) -> ResponseInputs:
    return ResponseInputs(logps, LENGTHS, None, REFERENCE, LABELS, Statistics(mean, 1.0, count))


@pytest.mark.parametrize(("mean", "count"), [(1.5, 5), (-1.5, 5), (1.5, 0)])
def test_the_papers_formula(mean: float, count: int) -> None:
    """V of Eq. 7: the loss is lambda_y - v, with z0 clipped at 0 and no gradient through it."""
    logps = LOGPS.clone().requires_grad_()
    found = build_loss(parse_loss(OPTIONS)).of_responses(inputs(mean, count, logps))
    z0 = max(0.0, mean) if count else 0.0
    for place in range(len(LOGPS)):
        ratio = float(LOGPS[place] - REFERENCE[place])
        weight, x = (1.3, 0.2 * (ratio - z0)) if LABELS[place] else (0.6, 0.2 * (z0 - ratio))
        value = weight / (1 + math.exp(-x))
        assert found.losses[place].item() == pytest.approx(weight - value, rel=1e-12)
        slope = -weight * 0.2 / (1 + math.exp(-x)) / (1 + math.exp(x)) * (1 if LABELS[place] else -1)
        (gradient,) = torch.autograd.grad(found.losses[place], logps, retain_graph=True)
        assert gradient[place].item() == pytest.approx(slope, rel=1e-12)
        right = 0.2 * ratio > 0.2 * z0 if LABELS[place] else 0.2 * ratio < 0.2 * z0
        assert found.metrics["rewards/accuracies"][place] == float(right)
    assert torch.allclose(found.rewards, 0.2 * (LOGPS - REFERENCE))
    assert set(found.metrics["kto/z"].tolist()) == {0.2 * z0}


def test_what_is_observed_is_the_log_ratio() -> None:
    loss = build_loss(parse_loss(OPTIONS))
    running = RunningStatistics(loss.statistics)
    running.update(loss.observe_responses(inputs()))
    assert running.current().mean == pytest.approx(float((LOGPS - REFERENCE).mean()))
    assert loss.needs_mismatched


def test_zero_is_apo_zero() -> None:
    loss = build_loss(parse_loss({**OPTIONS, "reference_point": "zero"}))
    assert loss.statistics is None
    assert not loss.needs_mismatched
    assert loss.observe_responses(inputs()) is None
    expected = build_loss(parse_loss(OPTIONS)).of_responses(inputs(0.0, 0)).losses
    assert torch.equal(loss.of_responses(inputs()).losses, expected)


def test_a_pair_weighs_as_its_two_answers() -> None:
    loss = build_loss(parse_loss(OPTIONS))
    columns: Any = (*LOGPS[:2, None], *LENGTHS[:2, None], *REFERENCE[:2, None])
    known: dict[str, Any] = {"statistics": Statistics(0.7, 1, 1)}
    of_pair = loss(LossInputs(*columns, **known))
    labels = torch.tensor([True, False])
    answers = ResponseInputs(LOGPS[:2], LENGTHS[:2], None, REFERENCE[:2], labels, Statistics(0.7, 1, 1))
    assert of_pair.losses.mean().item() == pytest.approx(loss.of_responses(answers).losses.mean().item(), rel=1e-15)


def test_only_good_answers_are_held_up() -> None:
    plain, held = (build_loss(parse_loss({**OPTIONS, "sft_weight": weight})) for weight in (0.0, 0.5))
    more = held.of_responses(inputs()).losses - plain.of_responses(inputs()).losses
    assert torch.allclose(more, torch.where(LABELS, -0.5 * LOGPS / LENGTHS, torch.zeros_like(LOGPS)))


def test_metrics_of_answers() -> None:
    loss = build_loss(parse_loss(OPTIONS))
    table = AnswerMetrics(answer_columns(loss), 5, torch.device("cpu"))
    outputs = loss.of_responses(inputs(1.0))
    values = {
        "loss": outputs.losses,
        "logps/sum": LOGPS,
        "lengths/predicted": LENGTHS,
        "answers/desirable": LABELS,
        "reward": outputs.rewards,
        "statistic": LOGPS,
        **outputs.metrics,
    }
    table.put(torch.arange(5), values)
    found = table.metrics()
    assert found["rewards/chosen"] == pytest.approx(0.2 * (-2.0 + 2.5) / 2)
    assert found["rewards/rejected"] == pytest.approx(0.2 * (-0.25 - 20.0 + 2.5) / 3)
    assert found["rewards/margins"] == pytest.approx(found["rewards/chosen"] - found["rewards/rejected"])
    assert found["rewards/accuracies"] == pytest.approx(3 / 5)
    assert found["logps/chosen"] == pytest.approx((-12 / 5 - 30.5 / 9) / 2)
    assert found["lengths/rejected"] == pytest.approx(25 / 3)
    assert found["answers/desirable"] == pytest.approx(0.4)
    assert not {"statistic", "reward", "logps/sum"} & found.keys()
    table.values = table.values[:2]
    alone = table.metrics()
    assert "rewards/chosen" in alone
    assert not {"rewards/rejected", "rewards/margins", "logps/rejected"} & alone.keys()


@pytest.mark.parametrize(
    ("counts", "weights", "good"),
    [
        ((10, 10), (1, 1), True),
        ((40, 30), (1, 1), True),
        ((41, 30), (1, 1), False),
        ((29, 30), (1, 1), False),
        ((30, 10), (1, 3), True),
        ((10, 30), (4, 1), True),
        ((10, 30), (4.1, 1), False),
    ],
)
def test_advice_on_weights(counts: tuple[int, int], weights: tuple[float, float], good: bool) -> None:
    """KTO's Eq. 8: lambda_D n_D / (lambda_U n_U) from 1 to 4/3. What is advised is within it."""
    desirable, undesirable = counts
    config = KTOConfig(desirable_weight=weights[0], undesirable_weight=weights[1])
    advice = weights_advice(desirable, undesirable, config)
    assert (advice is None) == good
    if advice is None:
        return
    words = advice.replace(",", " ").split()
    bounds = [float(words[place + step]) for place, word in enumerate(words) if word == "between" for step in (1, 3)]
    for weight in bounds[:2]:
        assert 0.99 < weight * desirable / (weights[1] * undesirable) < 1.35
    for weight in bounds[2:]:
        assert 0.99 < weights[0] * desirable / (weight * undesirable) < 1.35


@pytest.mark.parametrize("counts", [(0, 4), (4, 0)])
def test_one_label_alone_is_told(counts: tuple[int, int]) -> None:
    assert "all answers are" in str(weights_advice(counts[0], counts[1], KTOConfig()))
