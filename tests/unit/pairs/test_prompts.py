"""Prompts from rows of every layout, each once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.data.messages import RowError
from nemo_lmpo.errors import DataError
from nemo_lmpo.pairs.prompts import asked_prompt, read_source

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi"}, [USER]),
        ({"prompt": [SYSTEM, USER]}, [SYSTEM, USER]),
        ({"prompt": "Hi", "system": "Be brief"}, [SYSTEM, USER]),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, [USER]),
        ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, [USER]),  # no pair, but a prompt
        ({"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "x"}]}, [USER]),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"}, [USER]),
        ({"messages": [USER, ANSWER]}, [USER]),
        ({"messages": [USER]}, [USER]),
        ({"messages": [USER, ANSWER, USER]}, [USER, ANSWER, USER]),
        ({"prompt": "Hi", "completion": "Hello"}, [USER]),
        ({"instruction": "Hi", "output": "Hello"}, [USER]),
        ({"prompt": "Hi", "answer": "42"}, [USER]),
    ],
)
def test_prompts_of_rows(row: dict[str, Any], expected: list[dict[str, Any]]) -> None:
    found = asked_prompt(row)
    assert found.messages == expected
    assert found.id == asked_prompt({"prompt": expected}).id
    assert found.row is row


def test_the_id_is_that_of_all_that_the_model_sees() -> None:
    tools = [{"name": "f"}]
    ids = {
        asked_prompt(row).id
        for row in ({"prompt": "Hi"}, {"prompt": "Ho"}, {"prompt": "Hi", "tools": tools}, {"prompt": [SYSTEM, USER]})
    }
    assert len(ids) == 4


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "Hi"}, "no prompt"),
        ({"prompt": ""}, "the prompt has no text"),
        ({"prompt": [USER, ANSWER]}, "not 'user'"),
        ({"prompt": 5}, "of type int"),
        (7, "not an object"),
    ],
)
def test_rows_without_a_prompt(row: Any, said: str) -> None:
    with pytest.raises(RowError, match=said):
        asked_prompt(row)


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_sources_give_each_prompt_once_and_count_the_rest(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", {"prompt": "x"}, {"prompt": "y"}, {"prompt": "x"}, {"text": "?"}, {"prompt": "z"}
    )
    with pytest.raises(DataError, match=r"a.jsonl line 4: .*--skip-bad-rows"):
        read_source(path, "train", None, None, skip_bad=False)
    found = read_source(path, "train", None, None, skip_bad=True)
    assert [prompt.given for prompt in found.prompts] == ["x", "y", "z"]
    assert found.left_out == {"repeated": 1, "missing field": 1}
    assert [prompt.given for prompt in read_source(path, "train", None, 2, skip_bad=True).prompts] == ["x", "y"]
    changed = write(tmp_path / "b.jsonl", {"prompt": "x"}, {"prompt": "Y"})
    assert read_source(changed, "train", None, None, skip_bad=False).sha256 != found.sha256


def test_the_prompts_column_has_a_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "x", "answer": "1"})
    assert [prompt.given for prompt in read_source(path, "train", "question", None, skip_bad=False).prompts] == ["x"]
    with pytest.raises(DataError, match="the field 'task' is missing"):
        read_source(path, "train", "task", None, skip_bad=False)
    with pytest.raises(DataError, match="gives no prompt"):
        read_source(path, "train", "task", None, skip_bad=True)


def test_generated_tasks_are_sources() -> None:
    assert len(read_source("builtin:tiny", "test", None, 10, skip_bad=False).prompts) == 10
