"""Differences, ranks and verdicts against computations by other means."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_lmpo.evaluate.result import Judge, Model, Result, Value, read_result, write_result
from nemo_lmpo.evaluate.suites import ALPACA_EVAL, ARENA_HARD, COLUMNS, LEADERBOARD, TASKS
from nemo_lmpo.paper.tables.claims import Results, claims_of, judge
from nemo_lmpo.paper.tables.differences import average_ranks, compare, compare_ranks
from nemo_lmpo.paper.verdicts import CONTRADICTED, NOT_MEASURED, SHOWN, UNDECIDED

JUDGE = Judge("judge", {"judge-1": 10}, "http://localhost/v1", "prompt")


def made(
    folder: Path,
    suite: str,
    units: dict[str, Any],
    *,
    row: tuple[Any, ...] = ("tiny", "LMPO", None),
    judge_: Judge | None = JUDGE,
    **values: float,
) -> Result:
    result = Result(
        suite=suite,
        model=Model(folder.name, "given", "training", *row),
        values={name: Value(value) for name, value in values.items()},
        n=3,
        of=3,
        unparsed=0,
        truncated=0,
        empty=0,
        judge=judge_,
        date="2026-11-24T00:00:00+00:00",
        generation={},
        packages={},
        evaluation_set={"name": suite, "sha256": "0"},
        command="python -m nemo_lmpo.evaluate",
    )
    write_result(folder, result, units)
    return read_result(folder)


def test_paired_difference_has_the_interval_of_the_paired_differences(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    hardness = random.normal(50, 30, 400)  # shared by both models, so it must cancel
    one = {"ids": list(range(400)), "wins": (hardness + random.normal(3, 4, 400)).tolist(), "lengths": [1] * 400}
    two = {"ids": list(range(400)), "wins": (hardness + random.normal(0, 4, 400)).tolist(), "lengths": [1] * 400}
    found = compare(made(tmp_path / "a", ALPACA_EVAL, one), made(tmp_path / "b", ALPACA_EVAL, two), "wr")
    change = np.subtract(one["wins"], two["wins"])
    width = 2 * 1.96 * change.std(ddof=1) / math.sqrt(400)
    assert found.value == pytest.approx(change.mean())
    assert found.interval is not None
    assert found.interval.high - found.interval.low == pytest.approx(width, rel=0.1)
    assert found.verdict == SHOWN


def test_verdicts_by_the_side_of_zero(tmp_path: Path) -> None:
    ids = list(range(50))
    lengths = {"short": [10 + index % 3 for index in ids], "long": [30 + index % 5 for index in ids]}
    lengths["mixed"] = [10 + index % 3 + (1 if index % 2 else -1) for index in ids]
    results = {
        name: made(tmp_path / name, ALPACA_EVAL, {"ids": ids, "wins": [50.0] * 50, "lengths": values})
        for name, values in lengths.items()
    }
    assert compare(results["long"], results["short"], "length").verdict == SHOWN
    assert compare(results["short"], results["long"], "length").verdict == CONTRADICTED
    assert compare(results["mixed"], results["short"], "length").verdict == UNDECIDED
    assert compare(results["mixed"], None, "length").verdict == NOT_MEASURED


def test_judged_numbers_need_one_judge_and_lengths_do_not(tmp_path: Path) -> None:
    units = {"ids": ["a", "b"], "wins": [1.0, 2.0], "lengths": [1, 2], "weights": [2, 2]}
    one = made(tmp_path / "a", ARENA_HARD, units)
    for other in (
        Judge("other", {"judge-1": 10}, "http://localhost/v1", "prompt"),
        Judge("judge", {"judge-2": 10}, "http://localhost/v1", "prompt"),
        Judge("judge", {"judge-1": 10}, "http://localhost/v1", "another prompt"),
    ):
        two = made(tmp_path / "b", ARENA_HARD, units, judge_=other)
        assert "different judges" in compare(one, two, "wr").reason
        assert compare(one, two, "length").value == 0


def test_other_instructions_are_not_compared(tmp_path: Path) -> None:
    one = made(tmp_path / "a", ARENA_HARD, {"ids": ["a", "b"], "wins": [1, 2], "lengths": [1, 2], "weights": [2, 2]})
    two = made(tmp_path / "b", ARENA_HARD, {"ids": ["a", "c"], "wins": [1, 2], "lengths": [1, 2], "weights": [2, 2]})
    assert compare(one, two, "length").reason == "they answer other instructions"


def test_arena_differences_weigh_battles(tmp_path: Path) -> None:
    ids = [str(index) for index in range(60)]
    one = {"ids": ids, "wins": [100.0] * 60, "weights": [6.0] * 60, "lengths": [1] * 60}
    two = {"ids": ids, "wins": [100.0, 0.0] * 30, "weights": [2.0, 6.0] * 30, "lengths": [1] * 60}
    found = compare(made(tmp_path / "a", ARENA_HARD, one), made(tmp_path / "b", ARENA_HARD, two), "wr")
    assert found.value == pytest.approx(100 - 100 * 2 / 8)


def test_judgments_without_label_leave_out_the_pair(tmp_path: Path) -> None:
    ids = list("abcd")
    one = {"ids": ids, "wins": [10.0, None, 30.0, 40.0], "lengths": [1] * 4}
    two = {"ids": ids, "wins": [0.0, 99.0, None, 10.0], "lengths": [1] * 4}
    found = compare(made(tmp_path / "a", ALPACA_EVAL, one), made(tmp_path / "b", ALPACA_EVAL, two), "wr")
    assert (found.value, found.pairs) == (20.0, 2)


def test_length_controlled_needs_the_same_resamples(tmp_path: Path) -> None:
    units = {"ids": ["a"], "wins": [1.0], "lengths": [1], "rounds": 3, "seed": 123}
    one = made(tmp_path / "a", ALPACA_EVAL, {**units, "lc_replicates": [5.0, 6.0, 7.0]}, lc=6.0)
    two = made(tmp_path / "b", ALPACA_EVAL, {**units, "lc_replicates": [4.0, 4.5, 5.5]}, lc=5.0)
    found = compare(one, two, "lc")
    assert found.value == 1
    assert found.interval is not None
    # Paired: 1, 1.5 and 1.5, wherever their unpaired ranges overlap.
    assert 1 <= found.interval.low < found.interval.high <= 1.5
    three = made(tmp_path / "c", ALPACA_EVAL, {**units, "rounds": 2, "lc_replicates": [4.0, 4.5]}, lc=5.0)
    assert "--bootstrap" in compare(one, three, "lc").reason


def leaderboard(folder: Path, method: str, shift: float) -> Result:
    random = np.random.default_rng(7)  # the same documents are hard for everybody
    units, values = {}, {}
    for task in TASKS:
        scores = (100 * (random.random(200) < 0.4 + shift)).tolist()
        units[task.name] = {"ids": list(range(200)), "values": scores}
        values[task.name] = float(np.mean(scores))
    return made(folder, LEADERBOARD, units, row=("tiny", method, None), judge_=None, **values)


def test_ranks_over_ten_tasks(tmp_path: Path) -> None:
    results = {
        name: leaderboard(tmp_path / name, name, shift) for name, shift in (("LMPO", 0.2), ("SimPO", 0.0), ("DPO", 0.0))
    }
    ranks = average_ranks(results)
    assert ranks is not None
    assert ranks.mean == {"LMPO": 1.0, "SimPO": 2.5, "DPO": 2.5}  # equal ones share
    assert len(COLUMNS) == 10
    assert compare_ranks(ranks, "SimPO", "LMPO").verdict == SHOWN
    assert compare_ranks(ranks, "SimPO", "DPO").value == 0
    assert average_ranks({"LMPO": results["LMPO"]}) is None


def test_claims_follow_the_papers_numbers() -> None:
    every = {
        setting: claims_of(setting) for setting in ("llama3_8b_instruct", "llama3_8b_base", "mistral_7b_base", "tiny")
    }
    texts = {setting: [claim.text for claim in claims] for setting, claims in every.items()}
    # 1788 characters of SimPO are not more than LMPO's 1791, and 4.4 is not a better rank than 3.7.
    assert "LMPO answers shorter than SimPO" not in texts["llama3_8b_instruct"]
    assert not any("ranks before" in text for text in texts["llama3_8b_instruct"])
    assert "LMPO answers shorter than SimPO" in texts["mistral_7b_base"]
    assert sum(claim.table == 2 for claim in every["llama3_8b_base"]) == 5
    assert sum(claim.table == 3 for claim in every["mistral_7b_base"]) == 2
    assert {claim.table for claim in every["tiny"]} == {1, 2, 3, 4}


def test_a_claim_about_lambda_finds_its_rows(tmp_path: Path) -> None:
    ids = list(range(40))
    rows = {"a": ("tiny", "LMPO", "lambda=0.05"), "b": ("tiny", "LMPO", "lambda=1")}
    made_ = [
        made(tmp_path / name, ALPACA_EVAL, {"ids": ids, "wins": [1.0] * 40, "lengths": [size] * 40}, row=row)
        for (name, row), size in zip(rows.items(), (20, 10), strict=True)
    ]
    claim = next(claim for claim in claims_of("tiny") if claim.table == 3 and claim.value == "length")
    found = judge(claim, Results(made_))
    assert (found.value, found.verdict) == (10, SHOWN)
