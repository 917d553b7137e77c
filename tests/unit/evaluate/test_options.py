"""Values on the command line that mean nothing are refused by their option."""

from __future__ import annotations

import pytest

from nemo_lmpo.errors import ConfigError
from nemo_lmpo.evaluate.command import build_parser
from nemo_lmpo.evaluate.pairwise import prepare, sampling


@pytest.mark.parametrize("suite", ["alpaca_eval", "arena_hard"])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seed", str(2**70), "must be at least 0 and at most"),
        ("--seed", "-1", "must be at least 0 and at most"),
        ("--batch-size", "0", "must be at least 1"),
        ("--max-new-tokens", "0", "must be at least 1"),
        ("--temperature", "nan", "must be a finite number"),
        ("--temperature", "1e-40", "must be 0 [(]greedy[)], or at least"),
        ("--top-p", "0", "must be greater than 0 and at most 1"),
        ("--top-p", "nan", "must be a finite number"),
    ],
)
def test_generation_options(suite: str, option: str, value: str, message: str) -> None:
    given = [suite, "--judge-endpoint", "http://localhost", "--temperature", "0.5", f"{option}={value}"]
    options = build_parser("evaluate").parse_args(given)
    with pytest.raises(ConfigError, match=rf"{option} .* ?{message}"):
        sampling(options, suite, None)


def test_a_greedy_suite_takes_no_nucleus() -> None:
    options = build_parser("evaluate").parse_args(["arena_hard", "--judge-endpoint", "http://h", "--top-p", "0.5"])
    with pytest.raises(ConfigError, match="no effect without --temperature"):
        sampling(options, "arena_hard", None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--judge-max-tokens", "0"], "--judge-max-tokens 0 must be at least 1"),
        (["--judge-extra", "low"], "--judge-extra 'low' is not a JSON object"),
    ],
)
def test_judge_options_are_refused_before_anything_is_read(given: list[str], message: str) -> None:
    options = build_parser("evaluate").parse_args(["arena_hard", "--judge-endpoint", "http://h", *given])
    with pytest.raises(ConfigError, match=message):
        prepare(options)
