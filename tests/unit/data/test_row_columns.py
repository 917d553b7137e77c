"""Columns of one's own, and the line that is guessed for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.config.rules import check_settings
from nemo_lmpo.config.schema import Config, DataConfig
from nemo_lmpo.data.messages import RowError
from nemo_lmpo.data.preference import load_preference_dataset
from nemo_lmpo.data.rows.columns import mapped
from nemo_lmpo.data.rows.parse import parse_preference, parse_row
from nemo_lmpo.data.schema import ConversationRow, PreferenceRow
from nemo_lmpo.errors import ConfigError, DataError

USER, GOOD, BAD = ({"role": role, "content": text} for role, text in (("user", "Q"), *[("assistant", t) for t in "+-"]))
PAIR = PreferenceRow([USER], "+", "-")


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"question": "Q", "best": "+", "worst": "-"}, {"prompt": "question", "chosen": "best", "rejected": "worst"}),
        ({"prompt": "Q", "chosen": "+", "worst": "-"}, {"rejected": "worst"}),
        ({"prompt": "Q", "chosen": "-", "rejected": "+"}, {"chosen": "rejected", "rejected": "chosen"}),
        (
            {"x": {"q": "Q", "both": ["+", "-"]}},
            {"prompt": "x.q", "chosen": "x.both.0", "rejected": "x.both.-1"},
        ),
        ({"x": '{"q": "Q", "both": ["+", "-"]}'}, {"prompt": "x.q", "chosen": "x.both.0", "rejected": "x.both.1"}),
        ({"a.b": "Q", "a": {"b": "no"}, "chosen": "+", "rejected": "-"}, {"prompt": "a.b"}),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD], "prompt": "else"}, {"prompt": None}),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, {"prompt": "chosen.0.content"}),
        (  # SHP: the label is whether A has the higher score
            {"history": "Q", "human_ref_A": "-", "human_ref_B": "+", "score_A": 1, "score_B": 4, "labels": 0},
            {"prompt": "history", "responses": ["human_ref_A", "human_ref_B"], "scores": ["score_A", "score_B"]},
        ),
        (  # UltraFeedback by another score than its own
            {"instruction": "Q", "completions": [{"response": t, "a": {"b": s}} for t, s in (("-", 1), ("+", 2))]},
            {"responses": "completions.response", "scores": "completions.a.b"},
        ),
        ({"prompt": "Q", "chosen": "+", "rejected": "-"}, {"prompt": "absent", "system": "absent"}),
    ],
)
def test_columns_are_mapped(row: dict[str, Any], columns: dict[str, Any]) -> None:
    assert parse_preference(mapped(row, columns)) == PAIR


def test_mapped_columns_are_used_and_others_are_told() -> None:
    row = mapped({"question": "Q", "best": "+", "worst": "-", "score": 3}, {"prompt": "question", "chosen": "best"})
    assert row == {"worst": "-", "score": 3, "prompt": "Q", "chosen": "+"}
    assert parse_preference(mapped(row, {"rejected": "worst"})).columns == ("score",)
    with pytest.raises(RowError, match=r"path 'x.q' leads into a text that is not JSON: 'plain'"):
        mapped({"x": "plain"}, {"prompt": "x.q"})


TEXTS = "a question", "an answer", "another"


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (("question", "best", "worst"), "{prompt: question, chosen: best, rejected: worst} would make it a pair"),
        (
            ("question", "answer_a", "answer_b"),
            "{prompt: question, chosen: answer_a, rejected: answer_b} would make it a pair, if",
        ),
        (
            ("instruction", "chosen_response", "rejected_response"),
            "{prompt: instruction, chosen: chosen_response, rejected: rejected_response} would make it a pair",
        ),
        (("input", "winner", "loser"), "{prompt: input, chosen: winner, rejected: loser} would make it a pair"),
        (("question", "chosen", "rejected"), "{prompt: question} would make it a pair"),
        (("prompt", "chosen", "negative"), "{rejected: negative} would make it a pair"),
        (("my question", "good one", "bad one"), '{prompt: "my question", chosen: "good one", rejected: "bad one"}'),
        (("Question", "Answer"), "{prompt: Question, completion: Answer} would make it a conversation"),
        (("prompt", "response", "lang"), "{completion: response} would make it a conversation"),
        (("instruction", "context", "response"), "{input: context, output: response} would make it a conversation"),
    ],
)
def test_a_row_of_no_known_layout_shows_the_line_that_maps_it(names: tuple[Any, ...], line: str) -> None:
    row = dict(zip(names, TEXTS, strict=False))
    with pytest.raises(RowError) as error:
        parse_row(row)
    assert f"data.train.columns={line}" in str(error.value)
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"system": "S", "question": "Q", "chosen": "+", "rejected": "-"}, "{prompt: question} "),
        (
            {"prompt": "Q", "all_generated_responses": ["-", "+"], "all_rm_scores": [0, 1]},
            "{responses: all_generated_responses, scores: all_rm_scores} would make it a pair",
        ),
        ({"dialog": [USER, GOOD]}, "{messages: dialog} would make it a conversation"),
        ({"data": {"turns": [USER, GOOD]}}, "{messages: data.turns} would make it a conversation"),
        (
            {"question": "Q", "answer": "+", "system_prompt": "S"},
            "{prompt: question, completion: answer",
        ),
    ],
)
def test_other_values_are_guessed_too(row: dict[str, Any], line: str) -> None:
    with pytest.raises(RowError) as error:
        parse_row(row)
    assert f"data.train.columns={line}" in str(error.value)


@pytest.mark.parametrize("row", [{}, {"a": 1}, {"text": "x"}, {"\x1b": "x"}, {"q" * 300: "x"}])
def test_nothing_is_guessed_where_nothing_fits(row: dict[str, Any]) -> None:
    with pytest.raises(RowError, match="no known layout") as error:
        parse_row(row)
    assert "columns=" not in str(error.value)


def test_every_source_of_a_mixture_has_its_own(
    data_config: Callable[..., DataConfig], tiny: PreTrainedTokenizerBase, write_jsonl: Callable[..., str]
) -> None:
    first = write_jsonl([{"q": "sort b a", "best": "a b", "worst": "b a"}], "first.jsonl")
    second = write_jsonl([{"prompt": "sort d c", "chosen": "c d", "rejected": "d c"}], "second.jsonl")
    columns = {"prompt": "q", "chosen": "best", "rejected": "worst"}
    config = data_config([first, second])
    config.train.columns = [columns, None]
    data = load_preference_dataset(config, config.train, tiny)
    assert len(data) == 2
    config.train.columns = [None, None]
    with pytest.raises(DataError, match=r"first.jsonl line 1: .*columns={prompt: q|no known layout"):
        load_preference_dataset(config, config.train, tiny)


def test_settings_of_columns_are_checked() -> None:
    def config(*overrides: Any) -> Config | None:
        return load_recipe("lmpo_tiny", list(overrides))

    given = config("data.train.columns={prompt: question, chosen: 'a.0', rejected: [x, y]}")
    assert given.data.train.columns_of(0) == {"prompt": "question", "chosen": "a.0", "rejected": ["x", "y"]}
    check_settings(given)
    for override, words in {
        "data.train.columns={promt: q}": "columns.promt is no field of a layout; did you mean prompt",
        "data.train.columns={prompt: {a: b}}": "columns.prompt=.* is not a column",
        "data.train.columns=[{prompt: q},{prompt: q}]": "columns has 2 values for 1 paths",
        "data.train.columns=[3]": "columns holds 3, which is no group",
        "data.train.split=[a,b]": "split has 2 values for 1 paths",
        "data.train.encoding=utf-9": "encoding='utf-9' is unknown",
        "data.train.delimiter=abc": "delimiter='abc' is not one character",
    }.items():
        with pytest.raises(ConfigError, match=words):
            check_settings(config(override))


def test_conversations_are_mapped() -> None:
    row = {"data": ["Q", "+"], "system_prompt": "S"}
    parsed = parse_row(mapped(row, {"messages": "data", "system": "system_prompt"}))
    assert parsed == ConversationRow([{"role": "system", "content": "S"}, USER, GOOD])
