"""LMPO against arithmetic written out by hand, finite differences, and its extremes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from nemo_lmpo.config.loss_section import parse_loss
from nemo_lmpo.loss.interface import LossInputs, LossOutputs, Statistics
from nemo_lmpo.loss.margins import paper_margin
from nemo_lmpo.loss.options import LMPOConfig
from nemo_lmpo.loss.registry import build_loss
from nemo_lmpo.loss.running_statistics import RunningStatistics

# Two pairs: chosen shorter than rejected, and the other way round.
S_W, S_L, N_W, N_L = (-6.0, -30.0), (-20.0, -8.0), (4.0, 20.0), (10.0, 5.0)
A, B = 0.9, 0.05
BETA, LOG_H, LAM = 2.0, 1.6, 0.3


def expected(
    s_w: float,
    s_l: float,
    n_w: float,
    n_l: float,
    *,
    margin: str = "power5",
    average_length: bool = True,
    z_score: bool = True,
    statistics: tuple[float, float] | None = (A, B),
    alpha: float = 5.0,
    beta_s: float = 0.1,
) -> dict[str, float]:
    """Eq. 7-11 for one pair, one step at a time, as printed."""
    factor_w = (n_w + n_l) / (2 * n_w) if average_length else 1.0
    factor_l = (n_w + n_l) / (2 * n_l) if average_length else 1.0
    p_w = math.exp(s_w / n_w * factor_w)
    p_l = math.exp(s_l / n_l * factor_l)
    delta = p_w - p_l
    m = {
        "power5": (1 - p_w) * (1 - delta**5),
        "cube": (1 - p_w) + (1 - delta**3),
        "log": (1 - p_w) + (1 / alpha * math.log((1 - delta) / (1 + delta)) + 0.5),
        "sigmoid": (1 - p_w) * 1 / (1 + math.exp(delta / beta_s)),
    }[margin]
    if not z_score:
        m_bar = m
    elif statistics is None:
        m_bar = 0.0
    else:
        m_bar = (m - statistics[0]) / statistics[1]
    d = BETA * s_w / n_w - BETA * s_l / n_l - LAM * m_bar
    loss = -math.log(1 / (1 + math.exp(LOG_H) * math.exp(-d)))
    return {"p_w": p_w, "p_l": p_l, "m": m, "m_bar": m_bar, "loss": loss}


def lmpo_loss(inputs: LossInputs, config: LMPOConfig) -> LossOutputs:
    return build_loss(config)(inputs)


def lmpo_observe(inputs: LossInputs, config: LMPOConfig) -> torch.Tensor:
    return build_loss(config).observe(inputs)


def check(outputs: LossOutputs, rows: list[dict[str, float]]) -> None:
    torch.testing.assert_close(outputs.losses.detach(), torch.tensor([r["loss"] for r in rows], dtype=torch.float64))
    for name, key in (("margin", "m"), ("margin_normalized", "m_bar"), ("p_chosen", "p_w"), ("p_rejected", "p_l")):
        values = torch.tensor([row[key] for row in rows], dtype=torch.float64)
        torch.testing.assert_close(outputs.metrics[f"lmpo/{name}"], values)
        assert not outputs.metrics[f"lmpo/{name}"].requires_grad


def test_numbers_worked_by_hand(make_inputs: Callable[..., LossInputs]) -> None:
    # n_w = 4, n_l = 10: the exponent factors are 14/8 = 1.75 and 14/20 = 0.7.
    # avg_w = -1.5 -> p_w = e^-2.625 = 0.0724398; avg_l = -2 -> p_l = e^-1.4 = 0.2465970; delta = -0.1741572
    # delta^5 = -0.000160215; m = 0.9275602 * 1.000160215 = 0.9277088
    # m_bar = 0.0277088 / 0.05 = 0.554176; d = -3 + 4 - 0.3 * 0.554176 = 0.8337472
    # loss = ln(1 + e^(1.6 - 0.8337472)) = ln(1 + e^0.7662528) = ln(3.1516888) = 1.1479384
    inputs = make_inputs([-6.0], [-20.0], [4.0], [10.0], statistics=Statistics(A, B, 7))
    outputs = lmpo_loss(inputs, LMPOConfig(beta=2.0, log_h=1.6, lam=0.3))
    assert outputs.metrics["lmpo/p_chosen"].item() == pytest.approx(0.0724398, abs=1e-7)
    assert outputs.metrics["lmpo/p_rejected"].item() == pytest.approx(0.2465970, abs=1e-7)
    assert outputs.metrics["lmpo/margin"].item() == pytest.approx(0.9277088, abs=1e-7)
    assert outputs.metrics["lmpo/margin_normalized"].item() == pytest.approx(0.554176, abs=2e-6)
    assert outputs.losses.item() == pytest.approx(1.1479384, abs=1e-6)
    assert outputs.chosen_rewards.item() == -3.0
    assert outputs.rejected_rewards.item() == -4.0


@pytest.mark.parametrize("margin", ["power5", "cube", "log", "sigmoid"])
@pytest.mark.parametrize("average_length", [True, False])
@pytest.mark.parametrize("statistics", ["known", "empty", "off"])
def test_every_variant_against_the_printed_equations(
    make_inputs: Callable[..., LossInputs], margin: Any, average_length: bool, statistics: str
) -> None:
    config = LMPOConfig(
        beta=BETA,
        log_h=LOG_H,
        lam=LAM,
        margin=margin,
        average_length_normalization=average_length,
        z_score=statistics != "off",
    )
    config.validate()
    given = Statistics(A, B, 3) if statistics == "known" else Statistics()
    outputs = lmpo_loss(make_inputs(S_W, S_L, N_W, N_L, statistics=given), config)
    rows = [
        expected(
            *pair,
            margin=margin,
            average_length=average_length,
            z_score=statistics != "off",
            statistics=(A, B) if statistics == "known" else None,
        )
        for pair in zip(S_W, S_L, N_W, N_L, strict=True)
    ]
    check(outputs, rows)


def test_margin_constants_are_used(make_inputs: Callable[..., LossInputs]) -> None:
    pair = (S_W[0], S_L[0], N_W[0], N_L[0])
    cases: list[tuple[str, dict[str, Any]]] = [("log", {"alpha": 2.0}), ("sigmoid", {"beta_s": 0.7})]
    for margin, options in cases:
        config = LMPOConfig(beta=BETA, log_h=LOG_H, lam=LAM, margin=cast(Any, margin), **options)
        inputs = make_inputs(*([v] for v in pair), statistics=Statistics(A, B, 3))
        check(lmpo_loss(inputs, config), [expected(*pair, margin=margin, **options)])


class TestStandardDeviationFloor:
    """After batches of equal margins the deviation is 0 and the floor divides (docs/losses.md derives 0.01)."""

    @staticmethod
    def pair_after_equal_margins(make_inputs: Callable[..., LossInputs], **options: Any) -> tuple[float, float]:
        loss = build_loss(parse_loss({"beta": 2.0, "log_h": 1.6, "lam": 1.0, **options}))
        running = RunningStatistics(loss.statistics)
        for _ in range(3):
            running.update(loss.observe(make_inputs([-6.0, -6.0], [-8.0, -8.0], [4.0, 4.0], [4.0, 4.0])))
        inputs = make_inputs([-12.0], [-8.0], [4.0], [4.0], statistics=running.current())
        losses = loss(inputs).losses
        (gradient,) = torch.autograd.grad(losses.sum(), inputs.chosen_logps)
        return losses.item(), gradient.item() * 4  # by the mean log-probability, of 4 tokens

    def test_loss_and_gradient_stay_in_reach(self, make_inputs: Callable[..., LossInputs]) -> None:
        # Before: p_w = e^-1.5, p_l = e^-2, so m = 0.776866. Now p_w = e^-3 = 0.049787, m = 0.950217.
        # m_bar = 0.173351 / 0.01 = 17.3351; d = -6 + 4 - 17.3351; loss = ln(1 + e^(1.6 + 19.3351)) = 20.9351.
        # Gradient: -(beta + lam / 0.01 * p_w |dm/dp_w|) = -(2 + 4.9787 (1 + 5 * 0.950213 * 0.0855483^4)) = -6.9800.
        loss, gradient = self.pair_after_equal_margins(make_inputs)
        assert loss == pytest.approx(20.9351, abs=1e-3)
        assert gradient == pytest.approx(-6.9800, abs=1e-3)

    def test_a_floor_of_rounding_size_loses_the_pair(self, make_inputs: Callable[..., LossInputs]) -> None:
        loss, gradient = self.pair_after_equal_margins(make_inputs, std_floor=1e-6)
        assert loss == pytest.approx(173351, rel=1e-4)
        assert gradient == pytest.approx(-49800, rel=1e-3)

    def test_how_far_the_margin_follows_the_mean_log_probability(self) -> None:
        # The bounds that the floor rests on: p_w |dm/dp_w| <= 1 and p_l |dm/dp_l| <= 5 for any two probabilities.
        grid = torch.linspace(0, 1, 401, dtype=torch.float64)
        p_w, p_l = (p.flatten().requires_grad_() for p in torch.meshgrid(grid, grid, indexing="ij"))
        m = paper_margin("power5", p_w, p_l, 5.0, 0.1).sum()
        by_w, by_l = torch.autograd.grad(m, (p_w, p_l))
        assert (p_w * by_w).abs().max().item() == pytest.approx(1)
        assert (p_l * by_l).abs().max().item() == pytest.approx(5)


def test_h_and_log_h_are_the_same_number(make_inputs: Callable[..., LossInputs]) -> None:
    inputs = make_inputs(S_W, S_L, N_W, N_L)
    by_h = lmpo_loss(inputs, LMPOConfig(h=math.exp(1.6)))
    by_log_h = lmpo_loss(inputs, LMPOConfig(log_h=1.6))
    torch.testing.assert_close(by_h.losses, by_log_h.losses)
    assert LMPOConfig().resolved_log_h == 1.4
    assert LMPOConfig(h=1.0).resolved_log_h == 0.0


def test_without_home_advantage_and_margin_it_is_bradley_terry(make_inputs: Callable[..., LossInputs]) -> None:
    outputs = lmpo_loss(make_inputs(S_W, S_L, N_W, N_L), LMPOConfig(beta=1.0, log_h=0.0, lam=0.0))
    expected_losses = [math.log(1 + math.exp(-(w / a - r / b))) for w, r, a, b in zip(S_W, S_L, N_W, N_L, strict=True)]
    torch.testing.assert_close(outputs.losses.detach(), torch.tensor(expected_losses, dtype=torch.float64))


def gradient(make_inputs: Callable[..., LossInputs], config: LMPOConfig) -> tuple[float, float]:
    inputs = make_inputs([S_W[0]], [S_L[0]], [N_W[0]], [N_L[0]], statistics=Statistics(A, B, 3))
    grads = torch.autograd.grad(lmpo_loss(inputs, config).losses.sum(), (inputs.chosen_logps, inputs.rejected_logps))
    return grads[0].item(), grads[1].item()


def test_gradient_by_the_chain_rule(make_inputs: Callable[..., LossInputs]) -> None:
    # dL/dd = -sigma(log h - d); dd/dS_w = beta / n_w - lam / b * dm/dp_w * dp_w/dS_w, with
    # dm/dp_w = -(1 - delta^5) - 5 (1 - p_w) delta^4 and dp_w/dS_w = p_w (n_w + n_l) / (2 n_w^2).
    row = expected(S_W[0], S_L[0], N_W[0], N_L[0])
    p_w, p_l, n_w, n_l = row["p_w"], row["p_l"], N_W[0], N_L[0]
    delta = p_w - p_l
    dl_dd = -(1 - math.exp(-row["loss"]))
    dm_w = -(1 - delta**5) - 5 * (1 - p_w) * delta**4
    dm_l = 5 * (1 - p_w) * delta**4
    dp_w, dp_l = p_w * (n_w + n_l) / (2 * n_w**2), p_l * (n_w + n_l) / (2 * n_l**2)
    by_hand = (
        dl_dd * (BETA / n_w - LAM / B * dm_w * dp_w),
        dl_dd * (-BETA / n_l - LAM / B * dm_l * dp_l),
    )
    assert gradient(make_inputs, LMPOConfig(beta=BETA, log_h=LOG_H, lam=LAM)) == pytest.approx(by_hand, rel=1e-10)
    detached = gradient(make_inputs, LMPOConfig(beta=BETA, log_h=LOG_H, lam=LAM, detach_margin=True))
    assert detached == pytest.approx((dl_dd * BETA / n_w, -dl_dd * BETA / n_l), rel=1e-10)


@pytest.mark.parametrize("margin", ["power5", "cube", "log", "sigmoid"])
@pytest.mark.parametrize("z_score", [True, False])
@pytest.mark.parametrize("average_length", [True, False])
def test_gradient_against_finite_differences(margin: Any, z_score: bool, average_length: bool) -> None:
    config = LMPOConfig(lam=0.3, margin=margin, z_score=z_score, average_length_normalization=average_length)
    lengths = [torch.tensor(n, dtype=torch.float64) for n in (N_W, N_L)]

    def losses(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        inputs = LossInputs(chosen, rejected, lengths[0], lengths[1], statistics=Statistics(A, 0.3, 3))
        return lmpo_loss(inputs, config).losses

    sums = [torch.tensor(s, dtype=torch.float64, requires_grad=True) for s in (S_W, S_L)]
    assert torch.autograd.gradcheck(losses, sums)


EXTREMES = {
    "tiny probability": ([-1e4], [-1e4], [1.0], [1.0]),
    "chosen lost": ([-1e4], [-1e-3], [1.0], [2000.0]),
    "rejected lost": ([-1e-3], [-1e4], [2000.0], [1.0]),
    "both certain": ([0.0], [0.0], [1.0], [1.0]),
    "chosen certain, rejected impossible": ([0.0], [-1e4], [1.0], [1.0]),
    "chosen impossible, rejected certain": ([-1e4], [0.0], [1.0], [1.0]),
    "equal responses": ([-12.5], [-12.5], [9.0], [9.0]),
    "rounded above zero": ([1e-6], [-1e4], [1.0], [4000.0]),
}


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("margin", ["power5", "cube", "log", "sigmoid"])
@pytest.mark.parametrize("compat", ["paper", "released_code"])
@pytest.mark.parametrize("statistics", [Statistics(), Statistics(0.7, 0.0, 1), Statistics(0.7, 0.2, 1)])
def test_extremes_stay_finite_in_float32(
    make_inputs: Callable[..., LossInputs], case: str, margin: Any, compat: Any, statistics: Statistics
) -> None:
    inputs = make_inputs(*EXTREMES[case], statistics=statistics, dtype=torch.float32)
    config = LMPOConfig(margin=margin, compat=compat, lam=1.0)
    outputs = lmpo_loss(inputs, config)
    grads = torch.autograd.grad(outputs.losses.sum(), (inputs.chosen_logps, inputs.rejected_logps))
    for tensor in (outputs.losses, outputs.chosen_rewards, *outputs.metrics.values(), *grads):
        assert torch.isfinite(tensor).all()
    assert torch.isfinite(lmpo_observe(inputs, config)).all()


def test_a_large_loss_is_linear_not_infinite(make_inputs: Callable[..., LossInputs]) -> None:
    # r_w - r_l = 2.5 * (-1e4) = -25000: the loss is log h + 25000 up to rounding.
    inputs = make_inputs([-1e4], [0.0], [1.0], [1.0], dtype=torch.float32)
    outputs = lmpo_loss(inputs, LMPOConfig())
    assert outputs.losses.item() == pytest.approx(25001.4)
    assert torch.autograd.grad(outputs.losses.sum(), inputs.chosen_logps)[0].item() == pytest.approx(-2.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised_to_float32(make_inputs: Callable[..., LossInputs], dtype: torch.dtype) -> None:
    inputs = make_inputs([-6.5, -3.0], [-20.0, -9.0], [4.0, 3.0], [10.0, 8.0], dtype=dtype)
    outputs = lmpo_loss(inputs, LMPOConfig())
    exact = lmpo_loss(make_inputs([-6.5, -3.0], [-20.0, -9.0], [4.0, 3.0], [10.0, 8.0]), LMPOConfig())
    assert outputs.losses.dtype == torch.float32
    torch.testing.assert_close(outputs.losses.double(), exact.losses, rtol=1e-6, atol=1e-6)


def test_integer_lengths_are_fine(make_inputs: Callable[..., LossInputs]) -> None:
    inputs = make_inputs(S_W, S_L, N_W, N_L)
    integers = dataclasses.replace(
        inputs, chosen_lengths=inputs.chosen_lengths.long(), rejected_lengths=inputs.rejected_lengths.long()
    )
    torch.testing.assert_close(lmpo_loss(integers, LMPOConfig()).losses, lmpo_loss(inputs, LMPOConfig()).losses)


def test_observe_gives_the_margins_of_the_loss(make_inputs: Callable[..., LossInputs]) -> None:
    inputs = make_inputs(S_W, S_L, N_W, N_L)
    for compat in ("paper", "released_code"):
        config = LMPOConfig(compat=compat)
        observed = lmpo_observe(inputs, config)
        assert not observed.requires_grad
        torch.testing.assert_close(observed, lmpo_loss(inputs, config).metrics["lmpo/margin"])
