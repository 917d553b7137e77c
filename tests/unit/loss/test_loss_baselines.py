"""The other methods against their formulas written out with the math module, pair by pair."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nemo_lmpo.config.loss_section import parse_loss
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.loss.interface import LossInputs, LossOutputs, Statistics
from nemo_lmpo.loss.numerics import log1mexp
from nemo_lmpo.loss.registry import LOSSES, build_loss

S_W, S_L, N_W, N_L = (-6.0, -30.0), (-20.0, -8.0), (4.0, 20.0), (10.0, 5.0)
REF_W, REF_L = (-7.0, -25.0), (-18.5, -9.0)
KL = 0.4
MEAN_N_W = 12.0


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_odds(average: float) -> float:
    p = math.exp(average)
    return math.log(p / (1 - p))


CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "sft": ({"name": "sft"}, lambda w, x, a, b, rw, rx: (-w / a, w / a, x / b)),
    "sft per token of the batch": (
        {"name": "sft", "nll": "token_mean"},
        lambda w, x, a, b, rw, rx: (-w / MEAN_N_W, w / a, x / b),
    ),
    "dpo": (
        {"name": "dpo", "beta": 0.1},
        lambda w, x, a, b, rw, rx: (
            -math.log(sigmoid(0.1 * ((w - rw) - (x - rx)))),
            0.1 * (w - rw),
            0.1 * (x - rx),
        ),
    ),
    "dpo per token": (
        {"name": "dpo", "beta": 5.0, "average_log_probs": True},
        lambda w, x, a, b, rw, rx: (
            -math.log(sigmoid(5.0 * ((w - rw) / a - (x - rx) / b))),
            5.0 * (w - rw) / a,
            5.0 * (x - rx) / b,
        ),
    ),
    "rdpo": (
        {"name": "rdpo", "beta": 0.1, "alpha": 0.05},
        lambda w, x, a, b, rw, rx: (
            -math.log(sigmoid(0.1 * ((w - rw) - (x - rx)) + 0.05 * (a - b))),
            0.1 * (w - rw),
            0.1 * (x - rx),
        ),
    ),
    "ipo per token": (
        {"name": "ipo", "tau": 0.5},
        lambda w, x, a, b, rw, rx: (
            ((w - rw) / a - (x - rx) / b - 1 / (2 * 0.5)) ** 2,
            0.5 * (w - rw) / a,
            0.5 * (x - rx) / b,
        ),
    ),
    "ipo sums": (
        {"name": "ipo", "tau": 0.5, "average_log_probs": False},
        lambda w, x, a, b, rw, rx: (((w - rw) - (x - rx) - 1) ** 2, 0.5 * (w - rw), 0.5 * (x - rx)),
    ),
    "slic": (
        {"name": "slic", "delta": 2.0, "lam": 0.1},
        lambda w, x, a, b, rw, rx: (max(0.0, 2.0 - w + x) - 0.1 * w, w, x),
    ),
    "slic with the mean": (
        {"name": "slic", "delta": 2.0, "lam": 0.1, "nll": "mean"},
        lambda w, x, a, b, rw, rx: (max(0.0, 2.0 - w + x) - 0.1 * w / a, w, x),
    ),
    "rrhf": (
        {"name": "rrhf", "lam": 0.5},
        lambda w, x, a, b, rw, rx: (max(0.0, x / b - w / a) - 0.5 * w, w / a, x / b),
    ),
    "cpo": (
        {"name": "cpo", "beta": 0.05, "lam": 0.7},
        lambda w, x, a, b, rw, rx: (-math.log(sigmoid(0.05 * (w - x))) - 0.7 * w / a, 0.05 * w, 0.05 * x),
    ),
    "cpo per token of the batch": (
        {"name": "cpo", "beta": 0.05, "lam": 0.7, "nll": "token_mean"},
        lambda w, x, a, b, rw, rx: (-math.log(sigmoid(0.05 * (w - x))) - 0.7 * w / MEAN_N_W, 0.05 * w, 0.05 * x),
    ),
    "cpo with sums": (
        {"name": "cpo", "beta": 0.05, "lam": 0.7, "nll": "sum"},
        lambda w, x, a, b, rw, rx: (-math.log(sigmoid(0.05 * (w - x))) - 0.7 * w, 0.05 * w, 0.05 * x),
    ),
    "kto": (
        {"name": "kto", "beta": 0.1, "desirable_weight": 1.2, "undesirable_weight": 0.8},
        lambda w, x, a, b, rw, rx: (
            (1.2 * (1 - sigmoid(0.1 * (w - rw) - 0.1 * KL)) + 0.8 * (1 - sigmoid(0.1 * KL - 0.1 * (x - rx)))) / 2,
            0.1 * (w - rw),
            0.1 * (x - rx),
        ),
    ),
    "orpo": (
        {"name": "orpo", "lam": 0.5},
        lambda w, x, a, b, rw, rx: (
            -w / a - 0.5 * math.log(sigmoid(log_odds(w / a) - log_odds(x / b))),
            0.5 * w / a,
            0.5 * x / b,
        ),
    ),
    "simpo": (
        {"name": "simpo", "beta": 2.0, "gamma": 1.6},
        lambda w, x, a, b, rw, rx: (-math.log(sigmoid(2.0 * (w / a - x / b) - 1.6)), 2.0 * w / a, 2.0 * x / b),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_against_the_formula(make_inputs: Callable[..., LossInputs], case: str) -> None:
    options, formula = CASES[case]
    inputs = make_inputs(S_W, S_L, N_W, N_L, REF_W, REF_L, Statistics(mean=KL, count=2))
    outputs = build_loss(parse_loss(options))(inputs)
    rows = [formula(*pair) for pair in zip(S_W, S_L, N_W, N_L, REF_W, REF_L, strict=True)]
    for tensor, column in zip(
        (outputs.losses, outputs.chosen_rewards, outputs.rejected_rewards), zip(*rows, strict=True), strict=True
    ):
        torch.testing.assert_close(tensor.detach(), torch.tensor(column, dtype=torch.float64))
    assert not outputs.chosen_rewards.requires_grad
    assert not outputs.rejected_rewards.requires_grad
    assert outputs.losses.requires_grad


def test_every_loss_has_a_case() -> None:
    assert {options["name"] for options, _ in CASES.values()} | {"lmpo"} == set(LOSSES)


def test_numbers_worked_by_hand(make_inputs: Callable[..., LossInputs]) -> None:
    # One pair: S_w = -6 over 4 tokens, S_l = -20 over 10, reference -7 and -18.5.
    inputs = make_inputs([-6.0], [-20.0], [4.0], [10.0], [-7.0], [-18.5])

    def value(**options: Any) -> float:
        return build_loss(parse_loss(options))(inputs).losses.item()

    assert value(name="sft") == 1.5
    # (1) - (-1.5) = 2.5; ln(1 + e^-0.25) = ln 1.7788008 = 0.5759394
    assert value(name="dpo", beta=0.1) == pytest.approx(0.5759394, abs=1e-7)
    # 1/4 + 1.5/10 - 1 = -0.6
    assert value(name="ipo", tau=0.5) == pytest.approx(0.36)
    # 2.5 - 1 = 1.5
    assert value(name="ipo", tau=0.5, average_log_probs=False) == pytest.approx(2.25)
    # the hinge is closed: -6 is more than 1 above -20; 0.1 * 6
    assert value(name="slic", delta=1.0, lam=0.1) == pytest.approx(0.6)
    # hinge 16 - 14 = 2
    assert value(name="slic", delta=16.0, lam=0.1) == pytest.approx(2.6)
    # ln(1 + e^-1.4) = ln 1.2465970 = 0.2204174; + 6 / 4, or + 6
    assert value(name="cpo", beta=0.1, lam=1.0) == pytest.approx(1.7204174, abs=1e-7)
    assert value(name="cpo", beta=0.1, lam=1.0, nll="sum") == pytest.approx(6.2204174, abs=1e-7)
    # 1/4 + 1.5/10 = 0.4; ln(1 + e^-0.8) = ln 1.4493290 = 0.3711007
    assert value(name="dpo", beta=2.0, average_log_probs=True) == pytest.approx(0.3711007, abs=1e-7)
    # 0.25 + 0.05 * (4 - 10) = -0.05; ln(1 + e^0.05) = ln 2.0512711 = 0.7184597
    assert value(name="rdpo", beta=0.1, alpha=0.05) == pytest.approx(0.7184597, abs=1e-7)
    # -2 + 1.5 is below zero; 0.5 * 6
    assert value(name="rrhf", lam=0.5) == 3.0
    # z = 0: (sigmoid(-0.1) + sigmoid(-0.15)) / 2 = (0.4750208 + 0.4625702) / 2
    assert value(name="kto", beta=0.1) == pytest.approx(0.4687955, abs=1e-7)
    # odds 0.2231302 / 0.7768698 = 0.2872169, 0.1353353 / 0.8646647 = 0.1565177; ratio r = 1.8350452;
    # -ln(r / (1 + r)) = ln(2.8350452 / 1.8350452) = 0.4349888; 1.5 + 0.5 * 0.4349888
    assert value(name="orpo", lam=0.5) == pytest.approx(1.7174944, abs=1e-7)
    # 2 * 0.5 - 1.6 = -0.6; ln(1 + e^0.6) = ln 2.8221188 = 1.0374880
    assert value(name="simpo", beta=2.0, gamma=1.6) == pytest.approx(1.0374880, abs=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_gradient_against_finite_differences(case: str) -> None:
    loss = build_loss(parse_loss(CASES[case][0]))
    fixed: Any = [torch.tensor(v, dtype=torch.float64) for v in (N_W, N_L, REF_W, REF_L)]

    def losses(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        known: dict[str, Any] = {"mean_chosen_length": MEAN_N_W, "statistics": Statistics(KL, 1.0, 2)}
        inputs = LossInputs(chosen, rejected, *fixed, **known)
        return loss(inputs).losses.sum()

    sums = [torch.tensor(s, dtype=torch.float64, requires_grad=True) for s in (S_W, S_L)]
    assert torch.autograd.gradcheck(losses, sums)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "pair",
    [
        ([-1e4], [-1e4], [1.0], [1.0]),
        ([-1e4], [0.0], [1.0], [2000.0]),
        ([0.0], [-1e4], [2000.0], [1.0]),
        ([0.0], [0.0], [1.0], [1.0]),
        ([1e-6], [1e-6], [1.0], [1.0]),
        ([-7.5], [-7.5], [3.0], [3.0]),
    ],
)
@pytest.mark.parametrize("reference", [0.0, -1e4])
def test_extremes_stay_finite_in_float32(
    make_inputs: Callable[..., LossInputs], case: str, pair: tuple[Any, ...], reference: float
) -> None:
    inputs = make_inputs(*pair, [reference], [reference], Statistics(mean=1e4, count=1), dtype=torch.float32)
    outputs = build_loss(parse_loss(CASES[case][0]))(inputs)
    grads = torch.autograd.grad(
        outputs.losses.sum(), (inputs.chosen_logps, inputs.rejected_logps), allow_unused=True, materialize_grads=True
    )
    for tensor in (outputs.losses, outputs.chosen_rewards, outputs.rejected_rewards, *outputs.metrics.values(), *grads):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("name", ["dpo", "rdpo", "ipo", "kto"])
def test_missing_reference_is_named(make_inputs: Callable[..., LossInputs], name: str) -> None:
    loss = build_loss(parse_loss({"name": name}))
    assert loss.needs_reference
    with pytest.raises(ConfigError, match="reference_chosen_logps"):
        loss(make_inputs(S_W, S_L, N_W, N_L))


class TestLDDPO:
    """Pairs of 4 and 10, and of 20 and 5 tokens: the longer response is split after 4 and after 5."""

    SHARED = ((-6.0, -7.0), (-9.0, -8.0), (-7.0, -6.5), (-8.5, -9.0))

    def loss(self, make_inputs: Callable[..., LossInputs], **options: Any) -> tuple[LossOutputs, LossInputs]:
        inputs = make_inputs(S_W, S_L, N_W, N_L, REF_W, REF_L, shared=self.SHARED)
        return build_loss(parse_loss({"name": "dpo", "beta": 0.1, **options}))(inputs), inputs

    def test_by_hand(self, make_inputs: Callable[..., LossInputs]) -> None:
        # First pair: rho_w = 1, all of it shared; rho_l = -1.5, shared -0.5, so -0.5 + 0.3 (-1) = -0.8.
        # Second: rho_w = -5, shared -0.5, so -0.5 + 0.3 (-4.5) = -1.85; rho_l = 1, all of it shared.
        outputs, _ = self.loss(make_inputs, ld_alpha=0.3)
        expected = [math.log(1 + math.exp(-0.1 * (1 + 0.8))), math.log(1 + math.exp(-0.1 * (-1.85 - 1)))]
        assert outputs.losses.tolist() == pytest.approx(expected)
        assert outputs.chosen_rewards.tolist() == pytest.approx([0.1, -0.185])
        assert outputs.rejected_rewards.tolist() == pytest.approx([-0.08, 0.1])

    def test_per_token_divides_by_the_whole_length(self, make_inputs: Callable[..., LossInputs]) -> None:
        outputs, _ = self.loss(make_inputs, ld_alpha=0.3, average_log_probs=True)
        assert outputs.losses[0].item() == pytest.approx(math.log(1 + math.exp(-0.1 * (1 / 4 + 0.8 / 10))))

    def test_one_is_plain_dpo_and_zero_the_common_length_alone(self, make_inputs: Callable[..., LossInputs]) -> None:
        plain, _ = self.loss(make_inputs)
        torch.testing.assert_close(self.loss(make_inputs, ld_alpha=1)[0].losses, plain.losses)
        outputs, inputs = self.loss(make_inputs, ld_alpha=0)
        sums = torch.autograd.grad(outputs.losses.sum(), inputs.chosen_logps, materialize_grads=True)[0]
        assert sums.tolist() == [0.0, 0.0]

    def test_gradient_of_tail_tokens_is_scaled(self, make_inputs: Callable[..., LossInputs]) -> None:
        # A token of the tail moves S alone, a shared token S and S_shared.
        outputs, inputs = self.loss(make_inputs, ld_alpha=0.3)
        tail, shared = torch.autograd.grad(outputs.losses.sum(), (inputs.chosen_logps, inputs.chosen_shared_logps))
        torch.testing.assert_close(tail, 0.3 * (tail + shared))

    def test_what_it_needs_is_said(self, make_inputs: Callable[..., LossInputs]) -> None:
        assert build_loss(parse_loss({"name": "dpo", "ld_alpha": 0.5})).needs_shared_logps
        assert not build_loss(parse_loss({"name": "dpo"})).needs_shared_logps
        loss = build_loss(parse_loss({"name": "dpo", "ld_alpha": 0.5}))
        with pytest.raises(ConfigError, match="chosen_shared_logps is None"):
            loss(make_inputs(S_W, S_L, N_W, N_L, REF_W, REF_L))


PREFERENCE_LOSSES = sorted(set(LOSSES) - {"sft"})


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_sft_weight_adds_the_mean_likelihood_of_the_chosen_response(
    make_inputs: Callable[..., LossInputs], name: str
) -> None:
    inputs = make_inputs(S_W, S_L, N_W, N_L, REF_W, REF_L, Statistics(KL, 1.0, 2))
    plain = build_loss(parse_loss({"name": name}))(inputs)
    with_sft = build_loss(parse_loss({"name": name, "sft_weight": 0.25}))(inputs)
    # 6 / 4 and 30 / 20
    torch.testing.assert_close(with_sft.losses - plain.losses, torch.full((2,), 0.25 * 1.5, dtype=torch.float64))
    gradients = [torch.autograd.grad(o.losses.sum(), inputs.chosen_logps)[0] for o in (with_sft, plain)]
    expected = torch.tensor([-0.25 / 4, -0.25 / 20], dtype=torch.float64)
    torch.testing.assert_close(gradients[0] - gradients[1], expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(with_sft.chosen_rewards, plain.chosen_rewards)
    with pytest.raises(ConfigError, match=r"loss\.sft_weight=-1\.0 must be at least 0"):
        parse_loss({"name": name, "sft_weight": -1})


def test_reference_gets_no_gradient(make_inputs: Callable[..., LossInputs]) -> None:
    inputs = make_inputs(S_W, S_L, N_W, N_L, REF_W, REF_L)
    inputs.reference_chosen_logps.requires_grad_()
    losses = build_loss(parse_loss({"name": "dpo"}))(inputs).losses
    assert torch.autograd.grad(losses.sum(), inputs.reference_chosen_logps, allow_unused=True)[0] is None


def test_policy_equal_to_reference_gives_the_known_start(make_inputs: Callable[..., LossInputs]) -> None:
    inputs = make_inputs(S_W, S_L, N_W, N_L, S_W, S_L)
    for name, start in (("dpo", math.log(2)), ("kto", 0.5), ("ipo", 25.0)):
        losses = build_loss(parse_loss({"name": name}))(inputs).losses
        torch.testing.assert_close(losses.detach(), torch.full((2,), start, dtype=torch.float64))


class TestKTOReferencePoint:
    def test_observed_values_are_mean_log_ratios(self, make_inputs: Callable[..., LossInputs]) -> None:
        # ratios: chosen 1, -5; rejected -1.5, 1
        loss = build_loss(parse_loss({"name": "kto"}))
        assert loss.statistics is not None
        assert (loss.statistics.kind, loss.statistics.update) == ("batch_mean", "before_step")
        observed = loss.observe(make_inputs(S_W, S_L, N_W, N_L, REF_W, REF_L))
        assert observed.tolist() == [-0.25, -2.0]
        assert not observed.requires_grad

    def test_z_is_clipped_at_zero_and_scaled_by_beta(self, make_inputs: Callable[..., LossInputs]) -> None:
        loss = build_loss(parse_loss({"name": "kto", "beta": 0.5}))

        def z(statistics: Statistics) -> list[float]:
            inputs = make_inputs(S_W, S_L, N_W, N_L, REF_W, REF_L, statistics)
            return loss(inputs).metrics["kto/z"].tolist()

        assert z(Statistics(mean=3.0, count=2)) == [1.5, 1.5]
        assert z(Statistics(mean=-3.0, count=2)) == [0.0, 0.0]
        assert z(Statistics(mean=3.0, count=0)) == [0.0, 0.0]


def test_log1mexp_keeps_its_digits() -> None:
    # References in exact series: log(1 - e^x) = log(-x) + x/2 - x^2/24 for small -x, -e^x for large -x.
    tiny, large = -1e-12, -45.0
    values = log1mexp(torch.tensor([tiny, -1.0, large], dtype=torch.float64))
    assert values[0].item() == pytest.approx(math.log(1e-12) - 5e-13, rel=1e-15)
    assert values[1].item() == pytest.approx(math.log(1 - math.exp(-1)), rel=1e-15)
    assert values[2].item() == pytest.approx(-math.exp(-45), rel=1e-15)
