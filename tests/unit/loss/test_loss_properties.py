"""What must hold for any pair: monotonicity, order of pairs, and the relations between the losses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_lmpo.config.loss_section import parse_loss
from nemo_lmpo.loss.interface import LossInputs, Statistics
from nemo_lmpo.loss.registry import LOSSES, build_loss

pair = st.tuples(
    st.floats(-2000, 0),
    st.floats(-2000, 0),
    st.integers(1, 500),
    st.integers(1, 500),
    st.floats(-2000, 0),
    st.floats(-2000, 0),
)
pairs = st.lists(pair, min_size=1, max_size=6)
KNOWN = Statistics(mean=0.7, std=0.2, count=3)


def as_inputs(rows: list[tuple[float, ...]], dtype: torch.dtype = torch.float64) -> LossInputs:
    columns: Any = [torch.tensor(column, dtype=dtype) for column in zip(*rows, strict=True)]
    known: dict[str, Any] = {"mean_chosen_length": float(columns[2].mean()), "statistics": KNOWN}
    return LossInputs(*columns, **known)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=30, deadline=None)
@given(rows=pairs, data=st.data())
def test_pairs_do_not_see_each_other(name: str, rows: list[Any], data: Any) -> None:
    loss = build_loss(parse_loss({"name": name}))
    order = data.draw(st.permutations(range(len(rows))))
    whole = loss(as_inputs(rows))
    shuffled = loss(as_inputs([rows[i] for i in order]))
    assert whole.losses.shape == (len(rows),)
    torch.testing.assert_close(shuffled.losses, whole.losses[list(order)], rtol=1e-12, atol=0)
    torch.testing.assert_close(shuffled.chosen_rewards, whole.chosen_rewards[list(order)], rtol=1e-12, atol=0)
    assert torch.isfinite(whole.losses).all()


@pytest.mark.parametrize("name", ["lmpo", "dpo", "rdpo", "cpo", "kto", "orpo", "simpo", "slic", "rrhf"])
@settings(max_examples=40, deadline=None)
@given(row=pair, step=st.floats(1e-3, 50))
def test_a_likelier_chosen_response_never_costs_more(
    name: str, row: tuple[float, float, int, int, float, float], step: float
) -> None:
    loss = build_loss(parse_loss({"name": name}))
    s_w, *rest = row
    losses = loss(as_inputs([(s_w - step, *rest), (s_w, *rest)])).losses
    assert losses[1] <= losses[0] + 1e-9 * abs(losses[0])


@settings(max_examples=40, deadline=None)
@given(rows=pairs, gamma=st.floats(0, 4), beta=st.floats(0.1, 10))
def test_lmpo_without_margin_is_simpo(rows: list[Any], gamma: float, beta: float) -> None:
    inputs = as_inputs(rows)
    lmpo = build_loss(parse_loss({"lam": 0, "log_h": gamma, "beta": beta}))(inputs)
    simpo = build_loss(parse_loss({"name": "simpo", "gamma": gamma, "beta": beta}))(inputs)
    torch.testing.assert_close(lmpo.losses, simpo.losses)


@settings(max_examples=60, deadline=None)
@given(rows=pairs, margin=st.sampled_from(["power5", "log", "cube", "sigmoid"]))
def test_float32_agrees_with_float64(rows: list[Any], margin: str) -> None:
    loss = build_loss(parse_loss({"margin": margin}))
    single, double = loss(as_inputs(rows, torch.float32)), loss(as_inputs(rows))
    # The log margin is steep where one probability is 1 and the other 0: rounding of the probability shows there.
    tolerance = 2e-1 if margin == "log" else 1e-4
    torch.testing.assert_close(single.losses.double(), double.losses, rtol=1e-4, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(row=pair)
def test_power5_margin_lies_between_zero_and_two(row: tuple[float, float, int, int, float, float]) -> None:
    margin = build_loss(parse_loss({})).observe(as_inputs([row])).item()
    assert 0 <= margin <= 2
    assert not math.isnan(margin)
