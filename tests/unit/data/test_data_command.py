"""`nemo-lmpo data`: what a run would load, shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo import cli

PAIR = {"prompt": "sort b a", "chosen": "a b", "rejected": "b a"}
TURNS = [{"role": "user", "content": "sort b a"}, {"role": "assistant", "content": "a b"}] * 2


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*words: Any, status: int = 0) -> str:
        assert cli.main(["data", *map(str, words)]) == status
        said = capsys.readouterr()
        return said.err if status else said.out

    return run


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Any]:
    def write(*rows: Any) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def test_pairs_as_the_model_sees_them(shown: Callable[..., Any], write: Callable[..., Any]) -> None:
    page = shown(write(*[PAIR] * 7, {"question": "Q", "answer": "A"}), "--tokenizer", "builtin:tiny", "--rows", 2)
    assert "train: 7 pairs" in page
    assert "dropped: 1 unknown layout" in page
    assert "first unusable row" in page
    assert "data.train.columns={prompt: question, completion: answer}" in page
    assert page.count("\nchosen, 3 tokens:\n  >>>a b <eos><<<") == 2
    assert "<bos> <user> sort b a <assistant>" in page
    assert "\x1b" not in page


def test_conversations_have_every_turn_marked(shown: Callable[..., Any], write: Callable[..., Any]) -> None:
    page = shown(write({"messages": TURNS}), "--tokenizer", "builtin:tiny")
    assert page.count(">>>a b <eos><<<") == 2


def test_colour_on_a_terminal_and_nothing_of_the_data_acts_on_it(
    shown: Callable[..., Any], write: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write({"messages": TURNS}, {**PAIR, "chosen": "\x1b[2J"})
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    page = shown(path)
    assert "\x1b[32m[assistant] a b\x1b[0m" in page
    assert "\x1b[2J" not in page
    assert ">>>" not in page
    monkeypatch.setenv("NO_COLOR", "1")
    assert ">>>[assistant] a b<<<" in shown(path)


def test_rows_are_only_read_without_a_tokenizer(shown: Callable[..., Any], write: Callable[..., Any]) -> None:
    label = {"prompt": "Q", "completion": "A", "label": False}
    page = shown(write(PAIR, {"messages": TURNS}, label, {"text": "x"}, {**PAIR, "score": 3}), "--rows", 9)
    assert "2 pairs" in page
    assert "1 conversation, 1 labelled answer" in page
    assert "dropped: 1 unknown layout" in page
    assert "line 4: the row is of no known layout (fields: ['text'])" in page
    assert "answer with the label false" in page
    assert "1 rows with the unused column score" in page
    assert page.count(">>>[assistant] a b<<<") == 4


def test_columns_make_rows_usable_and_none_usable_is_an_error(
    shown: Callable[..., Any], write: Callable[..., Any]
) -> None:
    path = write({"question": "Q", "best": "+", "worst": "-"})
    line = "data.train.columns={prompt: question, chosen: best, rejected: worst}"
    for options in ([], ["--tokenizer", "builtin:tiny"]):
        said = shown(path, *options, status=1)
        assert line in said
        assert len(said.splitlines()[-1]) < 500
    assert "1 pair\n" in shown(path, "--columns", line.partition("=")[2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--columns", "{a"], "--columns '{a' cannot be read"),
        (["--columns", "{promt: a}"], "data.train.columns.promt is no field of a layout; did you mean prompt"),
        (["--schema", "alpaca"], "data.train.schema='alpaca' is unknown"),
        (["--template", "chatml"], "--template needs a tokenizer"),
        (["--limit", "0"], "data.train.limit=0 must be at least 1"),
        (["--model", "nowhere/at/all"], "nowhere/at/all does not exist"),
        (["--rows", "-1"], "--rows -1"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(
    shown: Callable[..., Any], write: Callable[..., Any], options: list[str], words: str
) -> None:
    assert words in shown(write(PAIR), *options, status=1)
