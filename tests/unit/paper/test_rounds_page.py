"""The page on rounds of own answers is what its benchmark measured, and its verdicts follow from the numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest

rounds_page = pytest.importorskip("benchmarks.rounds_page", reason="an installed package has no benchmarks folder")
METHODS, RIGHT, SAMPLED, TOKENS = rounds_page.METHODS, rounds_page.RIGHT, rounds_page.SAMPLED, rounds_page.TOKENS


def policy(right: float, tokens: float, longer: float) -> dict[str, float]:
    return {RIGHT: right, SAMPLED: right - 30, TOKENS: tokens, "pairs": 100, "longer_wins": longer}


def results(**changed: list[float]) -> dict[str, Any]:
    """Three seeds, in which nothing changes but the right answers of the methods that are named."""
    runs = {}
    for method in METHODS:
        for control in (False, True):
            for seed in range(3):
                gain = changed.get(method, [0.0] * 3)[seed] if not control else 0.0
                name = f"{method}{control}{seed}"
                policies = [policy(80, 8, 40), policy(80 + gain, 8 + control, 60)]
                runs[name] = {"method": method, "length_control": control, "seed": seed, "policies": policies}
    tuning = {method: {"1e-4": [policy(80, 8, 0)] * 2, "3e-5": [policy(82, 8, 0)] * 2} for method in METHODS}
    return {"tuning": tuning, "rates": dict.fromkeys(METHODS, "1e-4"), "runs": runs}


def test_the_page_holds_what_was_measured() -> None:
    found = json.loads(rounds_page.RESULTS.read_text())
    page = rounds_page.PAGE.read_text()
    for name, content in rounds_page.tables(found):
        assert rounds_page.place(page, name, content) == page, f"{name}: run python -m benchmarks.rounds_page --write"
    seeds = {run["seed"] for run in found["runs"].values()}
    assert len(seeds) >= 3
    assert len(found["runs"]) == 2 * len(METHODS) * len(seeds)


def test_a_verdict_needs_seeds_that_agree() -> None:
    """Gains of 3, 4, 5: mean 4, standard error 1/sqrt(3); Student's interval has 4.3027 of them on each side."""
    rows = {row[0]: row[1:] for row in rounds_page.verdict_rows(results(LMPO=[3, 4, 5], DPO=[-9, 9, 3]))}
    assert rows["LMPO: rounds raise the share of right greedy answers"] == ["shown", "+4.00 points (+1.52 to +6.48)"]
    assert rows["DPO: rounds raise the share of right greedy answers"][0] == "undecided"
    assert rows["SimPO: rounds raise the share of right greedy answers"][0] == "no difference"
    assert rows["LMPO: answers are shorter with `--length-control`"][0] == "contradicted"


def test_tables_have_every_variant_and_the_selected_rate() -> None:
    found = dict(rounds_page.tables(results(LMPO=[3, 4, 5])))
    assert "| LMPO | 84.0 ± 0.6 | 54.0 ± 0.6 | 8.0 ± 0.0 |" in found["rounds, policies"]
    assert "| LMPO, length control | 80.0 ± 0.0 | 50.0 ± 0.0 | 9.0 ± 0.0 |" in found["rounds, policies"]
    assert "| 3e-5 | 1e-4 |" in found["rounds, rates"]
    assert "| LMPO | 52.0 | **50.0** |" in found["rounds, rates"]
    assert "| LMPO, length control | 100.0 ± 0.0 | 40.0 ± 0.0 |" in found["rounds, pairs"]


def test_the_learning_rate_is_the_highest_within_one_standard_error() -> None:
    """Of 256 prompts, 62.5 % right has a standard error of 3.03 points."""
    measured = {"3e-6": 62.5, "1e-5": 61.0, "3e-5": 59.6, "1e-4": 59.4}
    found = {rate: [{SAMPLED: 62.0}, {SAMPLED: right}] for rate, right in measured.items()}
    assert rounds_page.selected_rate(found) == "3e-5"
