"""Comparisons: planning, statistics, pages; and a whole one, small, end to end."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.compare import main
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.paper.comparison.command import find_suites, unique
from nemo_lmpo.paper.comparison.measure import from_metrics
from nemo_lmpo.paper.comparison.page import Comparison, claim_rows, page_blocks, table_of
from nemo_lmpo.paper.comparison.results import estimate, judge, of_variant
from nemo_lmpo.paper.comparison.runs import plan_runs
from nemo_lmpo.paper.comparison.scales import SCALES, TINY, Scale, find_scale
from nemo_lmpo.paper.comparison.suites import (
    COMPAT,
    FIGURE2,
    HIGH,
    LMPO,
    LOW,
    MEASURES,
    MIDDLE,
    SIMPO,
    START,
    SUITES,
    TABLE3,
    Claim,
    Suite,
)
from nemo_lmpo.report.blocks import to_html, to_markdown
from nemo_lmpo.report.read import Metrics, Series

CLAIM = Claim("LMPO is longer", "nowhere", "length", LMPO, SIMPO)


def values(lmpo: list[float], simpo: list[float], **more: Any) -> dict[Any, Any]:
    table = {(LMPO, seed): {"length": value} for seed, value in enumerate(lmpo)}
    table.update({(SIMPO, seed): {"length": value} for seed, value in enumerate(simpo)})
    return {**table, **more}


def test_estimate_by_hand() -> None:
    found = estimate([1.0, 2.0, 6.0])
    # mean 3; squared deviations 4 + 1 + 9 = 14; variance 7; standard error sqrt(7 / 3)
    assert found.mean == 3.0
    assert found.error == pytest.approx(math.sqrt(7 / 3))
    assert estimate([5.0]).error is None
    assert estimate([]) is None


def test_verdicts_use_the_paired_difference() -> None:
    # Seeds differ by far more than the methods; the differences are 1.0, 1.1, 0.9: mean 1, error 0.0577.
    shown = judge(CLAIM, values([11.0, 21.1, 30.9], [10.0, 20.0, 30.0]))
    assert shown.verdict == "shown"
    assert shown.difference.mean == pytest.approx(1.0)
    assert shown.difference.error == pytest.approx(0.1 / math.sqrt(3))
    assert judge(CLAIM, values([10.0, 20.0, 30.0], [11.0, 21.1, 30.9])).verdict == "contradicted"


def test_verdict_boundary_is_students() -> None:
    # Differences 0, 1, 2: mean 1, error 1 / sqrt(3) = 0.577, quantile 4.303 -> 2.48 > 1.
    assert judge(CLAIM, values([0.0, 1.0, 2.0], [0.0, 0.0, 0.0])).verdict == "undecided"
    # Differences 2, 3, 4: mean 3 > 2.48.
    assert judge(CLAIM, values([2.0, 3.0, 4.0], [0.0, 0.0, 0.0])).verdict == "shown"


def test_twelve_seeds_take_the_quantile_of_eleven_degrees() -> None:
    # Six differences of 0 and six of 2 around a mean: deviation sqrt(12 / 11), error 0.3015; t(11) = 2.201 -> 0.6636.
    ends = [-1.0, 1.0] * 6
    below, above = [0.65 + end for end in ends], [0.68 + end for end in ends]
    assert judge(CLAIM, values(below, [0.0] * 12)).verdict == "undecided"  # the normal 1.96 would show 0.59
    assert judge(CLAIM, values(above, [0.0] * 12)).verdict == "shown"


def test_one_seed_decides_nothing() -> None:
    assert judge(CLAIM, values([5.0], [1.0])).verdict == "undecided"
    assert judge(CLAIM, values([5.0], [5.0])).verdict == "no difference"
    assert judge(CLAIM, values([5.0], [])).verdict == "not measured"


def test_start_model_counts_for_every_seed() -> None:
    claim = Claim("wider", "nowhere", "margin", LMPO, START)
    table = {(START, 42): {"margin": 1.0}, (LMPO, 42): {"margin": 1.9}, (LMPO, 43): {"margin": 2.1}}
    found = judge(claim, table)
    assert found.difference.count == 2
    assert found.difference.mean == pytest.approx(1.0)
    assert found.low.error is None  # one run, though compared twice
    turned = judge(Claim("narrower", "nowhere", "margin", START, LMPO), table)
    assert turned.difference.mean == pytest.approx(-1.0)


def test_change_is_since_the_start() -> None:
    table = {(START, 42): {"chosen": -2.0}, (LMPO, 42): {"chosen": -1.5}, (LMPO, 43): {"chosen": -2.5}}
    assert of_variant(table, LMPO, "chosen_change") == {42: 0.5, 43: -0.5}
    assert of_variant(table, START, "chosen_change") == {42: 0.0}
    assert of_variant({(LMPO, 42): {"chosen": -1.5}}, LMPO, "chosen_change") == {}


def test_measures_come_from_the_last_validation() -> None:
    series = {
        "val/rewards/accuracies": Series([10, 20], [0.5, 0.75]),
        "val/logps/chosen": Series([10, 20], [-2.0, -1.0]),
        "val/logps/rejected": Series([10, 20], [-2.0, -3.0]),
        "memory/peak": Series([1, 2], [0.5, 0.6]),
    }
    found = from_metrics(Metrics(series, 20))
    assert found == {"accuracy": 75.0, "chosen": -1.0, "rejected": -3.0, "margin": 2.0, "memory": 0.6}
    assert from_metrics(Metrics({"memory/peak": Series([1], [0.5])}, 1)) == {"memory": 0.5}


def plans_of(suites: list[Suite], tmp_path: Path, scale: Scale = TINY, **names: Any) -> dict[Any, Any] | None:
    return plan_runs(suites, scale, tmp_path, **{"seeds": 2, "start_model": None, "extra": [], **names})


def test_equal_settings_share_a_run(tmp_path: Path) -> None:
    plans = plans_of([FIGURE2, TABLE3, COMPAT], tmp_path)
    assert plans[LMPO, 42].directory == plans[MIDDLE, 42].directory  # LMPO's lambda is 0.2 there
    assert plans[LMPO, 42].directory != plans[LOW, 42].directory != plans[HIGH, 42].directory
    assert plans[LMPO, 42].directory != plans[LMPO, 43].directory
    assert (START, 43) not in plans
    runs = unique(plans)
    assert len(runs) == len({run.directory for run in runs}) < len(plans)


def test_runs_of_other_settings_lie_elsewhere(tmp_path: Path) -> None:
    before = plans_of([FIGURE2], tmp_path)[LMPO, 42]
    changed = plans_of([FIGURE2], tmp_path, extra=["optim.lr=3e-4"])[LMPO, 42]
    assert before.directory != changed.directory
    assert "optim.lr=3e-4" in changed.arguments()
    shown = plans_of([FIGURE2], tmp_path, extra=["logging.log_interval=5"])[LMPO, 42]
    assert shown.directory == before.directory


def test_a_mode_is_not_part_of_a_run(tmp_path: Path) -> None:
    before = plans_of([FIGURE2], tmp_path)[LMPO, 42]
    traced = plans_of([FIGURE2], tmp_path, extra=["traceback=true"])[LMPO, 42]
    assert traced.directory == before.directory
    assert "traceback=true" in traced.arguments()
    with pytest.raises(ConfigError, match=r"dry_run=plan trains nothing.*--list"):
        plans_of([FIGURE2], tmp_path, extra=["dry_run=plan"])


@pytest.mark.parametrize("name", SCALES)
def test_every_variant_of_every_suite_is_a_valid_recipe(name: str, tmp_path: Path) -> None:
    plans = plans_of(list(SUITES.values()), tmp_path, find_scale(name), seeds=1)
    assert {variant for variant, _ in plans} == {variant for suite in SUITES.values() for variant in suite.variants}


def test_every_claim_is_about_what_its_suite_compares() -> None:
    for suite in SUITES.values():
        for claim in suite.claims:
            assert {claim.high, claim.low} <= set(suite.variants), claim.text
            assert claim.measure in MEASURES
        assert set(suite.measures) <= set(MEASURES)


def test_wrong_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--suite figure9 is unknown"):
        find_suites(["figure9"])
    with pytest.raises(ConfigError, match="--scale big is unknown"):
        find_scale("big")
    assert main(["--suite", "figure2", "--seeds", "0"]) == 1
    assert "--seeds 0 must be at least 1" in capsys.readouterr().err
    assert main(["--suite", "figure2", "optim.lrr=3"]) == 1
    assert "did you mean optim.lr?" in capsys.readouterr().err
    assert find_suites(["all"]) == list(SUITES.values())
    assert find_suites(["figure2", "figure2"]) == [FIGURE2]


def test_list_prints_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--suite", "figure2", "--scale", "llama3_8b", "--output", str(tmp_path), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # start, LMPO, SimPO
    # The recipes' layout needs four processes.
    assert all(line.startswith("torchrun --nproc-per-node 4 -m nemo_lmpo.train --config-name") for line in lines)


def comparison(table: dict[Any, Any]) -> Comparison:
    return Comparison(TINY, [FIGURE2], 2, "command", table, {}, {LMPO: "lmpo_tiny"}, missing=["SimPO (seed 43)"])


def test_page_says_what_there_is_and_what_is_missing() -> None:
    table = {
        (START, 42): {"chosen": -2.0, "margin": 0.5},
        (LMPO, 42): {"chosen": -1.0, "margin": 1.0, "length": 10.0},
        (LMPO, 43): {"chosen": -1.2, "margin": 1.2, "length": 11.0},
        (SIMPO, 42): {"chosen": -3.0, "margin": 1.5, "length": 20.0},
    }
    page = comparison(table)
    header, rows = table_of(FIGURE2, page)
    assert header[1:] == ["chosen log-probability", "chosen: change", "margin", "answer length"]
    assert rows[1] == ["LMPO", "-1.100 ± 0.100", "0.900 ± 0.100", "1.100 ± 0.100", "10.5 ± 0.5"]
    assert rows[2] == ["SimPO", "-3.000", "-1.000", "1.500", "20.0"]
    claims = claim_rows(FIGURE2, page)
    assert [row[2] for row in claims] == ["undecided", "not measured", "undecided", "undecided"]
    blocks = page_blocks(page, {})
    for shown in (to_markdown(blocks), to_html("title", blocks)):
        assert "SimPO (seed 43)" in shown
        assert "1.100 ± 0.100" in shown


def test_text_of_answers_stays_text_in_both_pages() -> None:
    page = dataclasses.replace(comparison({}), examples={LMPO: [{"prompt": "a|b\n<user>", "answer": "<b>x</b>"}]})
    blocks = page_blocks(page, {})
    assert "| LMPO | a\\|b<br>&lt;user&gt; | &lt;b&gt;x&lt;/b&gt; |" in to_markdown(blocks)
    shown = to_html("a < b", blocks)
    assert "<title>a &lt; b</title>" in shown
    assert ">a|b\n&lt;user&gt;</td>" in shown
    assert "<b>x</b>" not in shown
