from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from nemo_lmpo.data.builtin.tiny_task import FILLERS, LETTERS, SPLIT_SIZES, builtin_rows, is_right, right_answer
from nemo_lmpo.data.builtin.tiny_tokenizer import VOCABULARY_SIZE
from nemo_lmpo.data.tokenizer import load_tokenizer
from nemo_lmpo.errors import ConfigError, DataError

TASKS = ("tiny", "tiny_long", "tiny_sft")


def texts(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["prompt"], row["chosen"][-1]["content"], row["rejected"][-1]["content"]


def fillers(text: str) -> int:
    return sum(word in FILLERS for word in text.split())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLIT_SIZES)
def test_rows_are_the_same_every_time_and_well_formed(task: str, split: str) -> None:
    rows = builtin_rows(task, split)
    assert rows == builtin_rows(task, split)
    assert len(rows) == SPLIT_SIZES[split]
    assert len({row["prompt_id"] for row in rows}) == len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        prompt, chosen, rejected = texts(row)
        letters = prompt.removeprefix("sort ").split()
        assert 3 <= len(letters) <= 8
        assert set(letters) <= set(LETTERS)
        assert [word for word in chosen.split() if word not in FILLERS] == sorted(letters)
        assert chosen != rejected
        assert row["chosen"][0] == row["rejected"][0] == {"role": "user", "content": prompt}


def test_no_test_answer_occurs_in_training_of_any_task() -> None:
    answers = {
        split: {right_answer(row["prompt"]) for task in TASKS for row in builtin_rows(task, split)}
        for split in SPLIT_SIZES
    }
    assert not answers["train"] & answers["test"]


def test_mix_of_the_tiny_task_is_the_documented_one() -> None:
    rows = builtin_rows("tiny", "train")
    kinds = {"right padded": 0, "wrong short": 0, "wrong padded": 0}
    for row in rows:
        prompt, chosen, rejected = texts(row)
        assert chosen == right_answer(prompt)
        right, padded = is_right(prompt, rejected), fillers(rejected) > 0
        assert not right or padded
        kinds[f"{'right' if right else 'wrong'} {'padded' if padded else 'short'}"] += 1
    share = {kind: count / len(rows) for kind, count in kinds.items()}
    # three standard errors of 4096 draws
    assert share["right padded"] == pytest.approx(0.4, abs=0.024)
    assert share["wrong short"] == pytest.approx(0.3, abs=0.022)
    assert share["wrong padded"] == pytest.approx(0.3, abs=0.022)


def test_tiny_long_prefers_longer_answers() -> None:
    rows = [texts(row) for row in builtin_rows("tiny_long", "train")]
    longer = sum(len(chosen.split()) > len(rejected.split()) for _, chosen, rejected in rows) / len(rows)
    assert 0.7 < longer < 0.9
    assert 0.45 < sum(is_right(prompt, rejected) for prompt, _, rejected in rows) / len(rows) < 0.55


def test_right_answers_by_hand() -> None:
    assert right_answer("sort d a c") == "a c d"
    assert is_right("sort d a c", "a c d")
    assert is_right("sort d a c", "a c d well so")
    assert not is_right("sort d a c", "a d c")
    assert not is_right("sort d a c", "a c")
    assert not is_right("sort d a c", "")


def test_unknown_names() -> None:
    with pytest.raises(DataError, match=r"'builtin:tny'.*tiny, tiny_long, tiny_sft"):
        builtin_rows("tny", "train")
    with pytest.raises(DataError, match=r"no split 'dev'.*train, test"):
        builtin_rows("tiny", "dev")
    with pytest.raises(ConfigError, match="builtin:big does not exist"):
        load_tokenizer("builtin:big")


def test_tokenizer_knows_every_word_and_survives_saving(tiny: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    assert len(tiny) == VOCABULARY_SIZE
    text = "<bos><user> sort d a <assistant> a d " + " ".join(FILLERS) + " <eos>"
    ids = tiny(text)["input_ids"]
    assert tiny.unk_token_id not in ids
    assert (ids[0], ids[-1]) == (tiny.bos_token_id, tiny.eos_token_id)
    tiny.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again(text)["input_ids"] == ids
    assert again.get_chat_template() == tiny.get_chat_template()
    messages = [{"role": "user", "content": "sort b a"}, {"role": "assistant", "content": "a b"}]
    assert again.apply_chat_template(messages, tokenize=False) == "<bos><user> sort b a <assistant> a b <eos>"
