"""Which pairs each rule makes of candidates that are written out."""

from __future__ import annotations

from collections import Counter

import pytest

from nemo_lmpo.errors import ConfigError, DataError
from nemo_lmpo.pairs.candidate import CUT, EMPTY, EQUAL_TEXT, NO_SCORE, Answered, AskedPrompt, Candidate
from nemo_lmpo.pairs.choose import ALL_EQUAL, TOO_FEW, choose_pairs, row_of
from nemo_lmpo.pairs.rules import EQUAL_SCORES, SMALL_MARGIN, TOO_UNEQUAL, Rule, parse_rule
from nemo_lmpo.pairs.statistics import longer_wins, statistics_of


def candidate(name: str, score: float | None, tokens: int = 10, **more: object) -> Candidate:
    values: dict[str, object] = {"text": f"text {name}", "finished": True, "score": score, **more}
    return Candidate(name, 0, 13, tokens=tokens, **values)  # type: ignore[arg-type]


FIVE = [candidate("a", 1.0, 10), candidate("b", 5.0, 40), candidate("c", 3.0, 20), candidate("d", 4.0, 12)]


def names(rule: Rule, candidates: list[Candidate]) -> list[str]:
    return [f"{chosen.name}>{rejected.name}" for chosen, rejected in rule.pairs("p", candidates)[0]]


@pytest.mark.parametrize(
    ("text", "ratio", "expected"),
    [
        ("best-worst", None, ["b>a"]),
        ("best-worst", 2.0, ["d>a"]),  # b is four times as long as a; d wins by 3, b over c by 2
        ("best-worst", 1.0, []),
        ("margin:4", None, ["b>a"]),
        ("margin:4.01", None, []),
        ("margin:3", 2.0, ["d>a"]),
        ("top-k:1", None, ["b>a"]),
        ("top-k:2", None, ["b>a", "d>c"]),
        ("top-k:9", None, ["b>a", "d>c"]),
        ("top-k:2", 2.0, ["d>c"]),
    ],
)
def test_rules(text: str, ratio: float | None, expected: list[str]) -> None:
    assert names(parse_rule(text, ratio, 42), FIVE) == expected


def test_why_there_is_no_pair() -> None:
    assert parse_rule("best-worst", 1.0, 0).pairs("p", FIVE) == ([], TOO_UNEQUAL)
    assert parse_rule("margin:9", None, 0).pairs("p", FIVE) == ([], SMALL_MARGIN)
    assert Rule().pairs("p", [candidate("a", 2.0), candidate("b", 2.0)]) == ([], EQUAL_SCORES)


def test_the_random_rule_takes_every_worse_one_and_always_the_same() -> None:
    rule = parse_rule("best-random", None, 1)
    found = Counter(rule.pairs(f"prompt {number}", FIVE)[0][0][1].name for number in range(300))
    assert set(found) == {"a", "c", "d"}
    assert min(found.values()) > 70  # a third of 300 each, four standard deviations are 33
    assert all(rule.pairs("x", FIVE)[0] == rule.pairs("x", FIVE)[0] for _ in range(3))
    assert all(names(parse_rule("best-random", 2.0, 1), FIVE)[0][0] == "b" for _ in range(3))


def test_equal_scores_make_no_pair_though_length_control_tells_them_apart() -> None:
    short, long = candidate("s", 1.0, 5, controlled=1.2), candidate("l", 1.0, 50, controlled=0.8)
    wrong = candidate("w", 0.0, 20, controlled=0.1)
    assert names(Rule(), [short, long, wrong]) == ["s>w"]
    assert Rule().pairs("p", [short, long]) == ([], EQUAL_SCORES)


@pytest.mark.parametrize(
    "text", ["best", "margin", "margin:x", "margin:0", "margin:nan", "top-k:1.5", "top-k:0", "top-k"]
)
def test_rules_that_mean_nothing(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--rule '{text}'"):
        parse_rule(text, None, 0)


@pytest.mark.parametrize("ratio", [0.5, -1.0, float("nan"), float("inf")])
def test_ratios_that_mean_nothing(ratio: float) -> None:
    with pytest.raises(ConfigError, match="--max-length-ratio"):
        parse_rule("best-worst", ratio, 0)


def asked(name: str) -> AskedPrompt:
    return AskedPrompt(name, [{"role": "user", "content": f"say {name}"}])


def test_everything_that_is_in_no_pair_is_counted() -> None:
    prompts = [
        Answered(
            asked("all kinds"),
            [
                candidate("1", 3.0),
                candidate("2", 1.0),
                candidate("3", 9.0, finished=False),
                candidate("4", 9.0, text="  "),
                candidate("5", 9.0, text="text 1 "),
                candidate("6", None),
            ],
        ),
        Answered(asked("all equal"), [candidate("1", 1.0, text="same"), candidate("2", 2.0, text="same")]),
        Answered(asked("one left"), [candidate("1", 1.0), candidate("2", 2.0, finished=False)]),
        Answered(asked("no scores"), [candidate("1", None), candidate("2", 2.0)]),
        Answered(asked("equal scores"), [candidate("1", 2.0), candidate("2", 2.0)]),
        Answered(asked("none"), []),
    ]
    chosen = choose_pairs(prompts, Rule(), length_control=False)
    assert [(pair.chosen.name, pair.rejected.name) for pair in chosen.pairs] == [("1", "2")]
    assert chosen.answers_left_out == {CUT: 2, EMPTY: 1, EQUAL_TEXT: 2, NO_SCORE: 2}
    assert chosen.prompts_left_out == {ALL_EQUAL: 1, TOO_FEW: 3, EQUAL_SCORES: 1}
    row = row_of(chosen.pairs[0], ["model"])
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("say all kinds", "text 1", "text 2")
    assert [one["score"] for one in row["candidates"]] == [3.0, 1.0, 9.0, 9.0, 9.0, None]
    with pytest.raises(DataError, match="not one pair is left of 5 prompts"):
        choose_pairs(prompts[1:], Rule(), length_control=False)


def test_numbers_of_pairs() -> None:
    chosen = choose_pairs([Answered(asked("p"), FIVE)], Rule(), length_control=True)
    numbers = statistics_of(chosen)
    assert numbers["longer_wins_candidates"] == pytest.approx(100 * 5 / 6)  # all but d over c, by hand
    assert numbers["tokens_candidates"] == pytest.approx(20.5)
    assert (numbers["score_chosen"] - numbers["score_rejected"]) > 0
    lengths, scores = [10, 40, 20, 12], [1, 5, 3, 4]
    import numpy as np

    assert numbers["correlation_length_score"] == pytest.approx(float(np.corrcoef(lengths, scores)[0, 1]))
    assert abs(numbers["correlation_length_controlled_score"]) < numbers["correlation_length_score"] / 2
    assert longer_wins([]) is None
    assert longer_wins([(FIVE[0], FIVE[0])]) == 50
