from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nemo_lmpo.data.messages import RowError
from nemo_lmpo.data.rows.pairs import pair_schema
from nemo_lmpo.data.rows.parse import parse_preference
from nemo_lmpo.data.schema import PreferenceRow
from tests.unit.data.pair_rows import message_row

USER = {"role": "user", "content": "Q"}
SYSTEM = {"role": "system", "content": "S"}


def said(text: int | str | None) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


EXPECTED = PreferenceRow([USER], "good", "bad")


@pytest.mark.parametrize(
    ("row", "schema"),
    [
        (message_row("Q", "good", "bad"), "messages"),
        ({"chosen": [USER, said("good")], "rejected": [USER, said("bad")]}, "messages"),
        ({"prompt": [USER], "chosen": "good", "rejected": "bad"}, "messages"),
        ({"prompt": [USER], "chosen": [said("good")], "rejected": [said("bad")]}, "messages"),
        ({"prompt": [USER], "chosen": [USER, said("good")], "rejected": [USER, said("bad")]}, "messages"),
        ({"prompt": "Q", "chosen": [said("good")], "rejected": [said("bad")]}, "messages"),
        ({"prompt": [USER], "chosen": said("good"), "rejected": said("bad")}, "messages"),
        ({"prompt": "Q", "chosen": said("good"), "rejected": said("bad")}, "messages"),
        ({"prompt": "Q", "chosen": "good", "rejected": "bad", "score": 3}, "strings"),
        ({"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"}, "hh"),
        ({"prompt": np.array([USER]), "chosen": np.array([said("good")]), "rejected": "bad"}, "messages"),
    ],
)
def test_every_schema_gives_the_same_row(row: dict[str, Any], schema: str) -> None:
    assert pair_schema(row) == schema
    assert parse_preference(row) == parse_preference(row, schema) == EXPECTED


def test_longer_conversations() -> None:
    history = [SYSTEM, USER, said("A"), {"role": "user", "content": "Q2"}]
    row = {"prompt": "Q", "chosen": [*history, said("good")], "rejected": [*history, said("bad")]}
    assert parse_preference(row) == PreferenceRow(history, "good", "bad")
    transcript = "\n\nHuman: Q\n\nAssistant: A: yes\n\nno\n\nHuman: Q2\n\nAssistant:"
    row = {"chosen": transcript + " good\n\ntext", "rejected": transcript + " bad"}
    turns = [USER, said("A: yes\n\nno"), {"role": "user", "content": "Q2"}]
    assert parse_preference(row) == PreferenceRow(turns, "good\n\ntext", "bad")


def test_strings_are_left_as_they_are() -> None:
    row = {"prompt": " Human: Q ", "chosen": " good\n", "rejected": "bad "}
    assert parse_preference(row) == PreferenceRow([{"role": "user", "content": " Human: Q "}], " good\n", "bad ")


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        ({"prompt": "Q", "chosen": "good"}, "missing field", "'rejected' is missing.*'prompt', 'chosen'"),
        ({"chosen": "good", "rejected": "bad"}, "missing field", "'prompt'"),
        ({"prompt": "Q", "chosen": None, "rejected": "bad"}, "missing field", "'chosen'"),
        ({"prompt": "Q", "chosen": " \n", "rejected": "bad"}, "empty response", "chosen"),
        (message_row("Q", "good", ""), "empty response", "rejected"),
        (message_row("Q", "same", "same"), "chosen equals rejected", "equal"),
        ({"prompt": "Q", "chosen": "same ", "rejected": " same"}, "chosen equals rejected", "equal"),
        ({"prompt": "Q", "chosen": 3, "rejected": "bad"}, "not text", "'chosen' is of type int"),
        ({"prompt": "Q", "chosen": "a \ud800", "rejected": "b"}, "not text", "surrogate"),
        ({"prompt": {"a": 1}, "chosen": "good", "rejected": "bad"}, "not text", "'prompt' is of type dict"),
        (
            {"prompt": "Q", "chosen": [USER, said(7)], "rejected": [USER, said("b")]},
            "not text",
            "message 2 of 'chosen'",
        ),
        ({"prompt": "Q", "chosen": [USER, said(None)], "rejected": [USER, said("b")]}, "not text", "null"),
        (
            {"prompt": "Q", "chosen": [USER, said("a")], "rejected": [{"role": "user", "content": "R"}, said("b")]},
            "prompts differ",
            "chosen and the rejected",
        ),
        ({"prompt": "else", "chosen": [USER, said("a")], "rejected": [USER, said("b")]}, "prompts differ", "'prompt'"),
        (
            {"prompt": [SYSTEM, USER], "chosen": [USER, said("a")], "rejected": "b"},
            "prompts differ",
            "'chosen' does not",
        ),
        (
            {"prompt": "Q", "chosen": [USER], "rejected": [USER, said("b")]},
            "wrong last role",
            "'user', not 'assistant'",
        ),
        ({"prompt": [USER, said("a")], "chosen": "b", "rejected": "c"}, "wrong last role", "'assistant', not 'user'"),
        ({"prompt": [], "chosen": "b", "rejected": "c"}, "missing field", "empty list"),
        ({"chosen": [said("a")], "rejected": [said("b")]}, "missing prompt", "no prompt"),
        ({"chosen": [{"role": "gpt", "content": "x"}], "rejected": [USER]}, "unknown role", "'gpt'"),
        ({"chosen": ["a", "b"], "rejected": ["c"]}, "missing field", "message 1 of 'chosen'"),
        ({"chosen": [USER, said("a")], "rejected": "b"}, "not text", "'rejected' is text"),
        ({"chosen": "\n\nHuman: Q", "rejected": "\n\nHuman: Q\n\nAssistant: b"}, "wrong last role", "ends with Human"),
        (
            {"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: R\n\nAssistant: b"},
            "prompts differ",
            "transcript",
        ),
        ({"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "text"}, "not a transcript", "'rejected'"),
        (
            {"chosen": "\n\nHuman: Q\n\nAssistant:", "rejected": "\n\nHuman: Q\n\nAssistant: b"},
            "empty response",
            "chosen",
        ),
        ([1, 2], "not an object", "of type list"),
        ("text", "not an object", "of type str"),
    ],
)
def test_unusable_rows(row: dict[str, Any] | list[int] | str, reason: str, words: str) -> None:
    with pytest.raises(RowError, match=words) as error:
        parse_preference(row)
    assert error.value.reason == reason


def test_a_prompt_text_may_be_formatted_differently_than_the_message() -> None:
    row = {"prompt": "### Q ###", "chosen": [USER, said("a")], "rejected": [USER, said("b")]}
    assert parse_preference(row).prompt == [USER]


def test_schema_can_be_forced() -> None:
    row = {"prompt": "Q", "chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: Q\n\nAssistant: b"}
    assert parse_preference(row, "strings").chosen == row["chosen"]
    assert parse_preference(row, "hh").chosen == "a"
