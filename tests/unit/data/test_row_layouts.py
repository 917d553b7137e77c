"""Rows in the layouts of public sets: each as its kind, and as the kind that a loss takes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nemo_lmpo.data.messages import RowError
from nemo_lmpo.data.rows.parse import parse_conversation, parse_judged, parse_preference, parse_row
from nemo_lmpo.data.schema import ConversationRow, PreferenceRow, UnpairedRow

SYSTEM = {"role": "system", "content": "S"}


def user(text: str = "Q") -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str = "good") -> dict[str, str]:
    return {"role": "assistant", "content": text}


def turn(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


PAIR = PreferenceRow([user()], "good", "bad")
TURNS = [user(), said("A"), user("Q2"), said()]
PAIRS = {
    "LLaMA-Factory's Alpaca": {"instruction": "Q", "chosen": "good", "rejected": "bad"},
    "LLaMA-Factory's ShareGPT": {
        "conversations": [turn("human", "Q")],
        "chosen": turn("gpt", "good"),
        "rejected": turn("gpt", "bad"),
    },
    "ranked texts": {"prompt": "Q", "responses": ["bad", "middle", "good"], "scores": [-1, 0.5, 2]},
    "ranks": {"prompt": "Q", "responses": ["good", "middle", "bad"], "ranks": [1, 2, 3]},
    "ranked JSON texts": {"prompt": "Q", "responses": '["bad", "good"]', "scores": "[1, 2]"},
    "UltraFeedback": {
        "instruction": "Q",
        "models": ["m", "n"],
        "completions": [
            {"model": "m", "response": "bad", "overall_score": 3.0, "annotations": {"helpfulness": {"Rating": "1"}}},
            {"model": "n", "response": "good", "overall_score": 8.5},
        ],
    },
    "Nectar": {
        "prompt": "\n\nHuman: Q\n\nAssistant: ",
        "answers": [{"answer": " bad", "rank": 7.0}, {"answer": " good", "rank": 1.0}],
    },
    "ranked messages": {
        "messages": [user()],
        "responses": [[said("bad")], [user(), said("good")]],
        "scores": [0, 1],
    },
}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS},
    "UltraChat": {"prompt": "Q", "prompt_id": "x", "messages": TURNS},
    "ShareGPT": {"conversations": [turn("human", "Q"), turn("gpt", "A"), turn("human", "Q2"), turn("gpt", "good")]},
    "Capybara": {"source": "x", "conversation": [{"input": "Q", "output": "A"}, {"input": "Q2", "output": "good"}]},
    "texts in turn": {"messages": ["Q", "A", "Q2", "good"]},
    "a transcript": {"messages": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: Q2\n\nAssistant: good"},
    "parts": {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in TURNS]},
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str) -> None:
    assert parse_row(PAIRS[name]) == parse_preference(PAIRS[name]) == parse_judged(PAIRS[name]) == PAIR
    assert parse_conversation(PAIRS[name]) == ConversationRow([user(), said()], 1)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations(name: str) -> None:
    row = CONVERSATIONS[name]
    assert parse_row(row) == parse_conversation(row) == ConversationRow(TURNS)
    as_text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
    if name not in ("Capybara", "texts in turn"):
        assert parse_row(as_text) == ConversationRow(TURNS)
    for parse, words in ((parse_preference, "without a preferred"), (parse_judged, "`label`")):
        with pytest.raises(RowError, match=f"{words}.*loss=sft") as error:
            parse(row)
        assert error.value.reason == "other kind of row"


@pytest.mark.parametrize(
    ("row", "messages", "prompt"),
    [
        ({"prompt": "Q", "completion": "good"}, [user(), said()], 1),
        ({"prompt": [SYSTEM, user()], "completion": [said()]}, [SYSTEM, user(), said()], 2),
        ({"prompt": "Q", "completion": [said("A"), user("Q2"), said()]}, TURNS, 1),
        ({"prompt": "\n\nHuman: Q\n\nAssistant:", "completion": " good"}, [user(), said()], 1),
        ({"instruction": "Q", "input": "", "output": "good", "text": "..."}, [user(), said()], 1),
        ({"instruction": "Q", "input": "more", "output": "good"}, [user("Q\nmore"), said()], 1),
        ({"instruction": "Q2", "input": None, "output": "good", "history": [["Q", "A"]]}, TURNS, 3),
        ({"instruction": "Q", "output": "good", "system": "S"}, [SYSTEM, user(), said()], 2),
        ({"system": "S", "conversations": [turn("human", "Q"), turn("gpt", "good")]}, [SYSTEM, user(), said()], 0),
    ],
)
def test_prompt_and_answer_apart(row: dict[str, Any], messages: list[dict[str, Any]], prompt: int) -> None:
    assert parse_row(row) == parse_conversation(row) == ConversationRow(messages, prompt)


@pytest.mark.parametrize("label", [True, False, 1, 0, "true", "False", 1.0])
def test_labels(label: bool | float | str) -> None:
    good = label in (True, "true")
    expected = UnpairedRow([user()], said(), good)
    for row in ({"prompt": "Q", "completion": "good"}, {"prompt": [user()], "completion": [said()]}):
        assert parse_row({**row, "label": label}) == parse_judged({**row, "label": label}) == expected
        for parse, loss in ((parse_preference, "loss=kto trains"), (parse_conversation, "columns={label: null}")):
            with pytest.raises(RowError, match=loss):
                parse({**row, "label": label})
