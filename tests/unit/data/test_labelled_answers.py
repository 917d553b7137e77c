"""Answers with a label as data: what is read, how pairs join them, and whose answer is laid behind whose prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from nemo_lmpo import cli
from nemo_lmpo.data.messages import RowError
from nemo_lmpo.data.mismatched import MismatchedAnswers, partners
from nemo_lmpo.data.order import epoch_order
from nemo_lmpo.data.preference import load_preference_dataset
from nemo_lmpo.data.rows.parse import parse_judged, parse_preference, parse_taken
from nemo_lmpo.data.schema import ConversationRow, UnpairedRow
from nemo_lmpo.errors import DataError

KTO = ("pairs", "labels")
USER, GOOD = {"role": "user", "content": "sort b a"}, {"role": "assistant", "content": "a b"}
ROW = {"prompt": [USER], "completion": [GOOD], "label": True}
BAD = {"prompt": "sort d c", "completion": "d c well", "label": False}
PAIR = {"id": "pair", "prompt": "sort f e", "chosen": "e f", "rejected": "f e so"}


@pytest.fixture
def load(
    tiny: PreTrainedTokenizerBase, data_config: Callable[..., Any], write_jsonl: Callable[..., Any]
) -> Callable[..., Any]:
    def load(
        rows: list[Any],
        name: str = "rows.jsonl",
        *,
        takes: Any = KTO,
        kind: Any = None,
        path: str | None = None,
        **settings: Any,
    ) -> Any:
        config = data_config(path or write_jsonl(rows, name), **settings)
        return load_preference_dataset(config, config.train, tiny, takes=takes, kind=kind)

    return load


@pytest.mark.parametrize("label", [None, "good", 2, -1, "", [True], float("nan")])
def test_other_labels_are_named(label: Any) -> None:
    with pytest.raises(RowError, match=r"the field 'label' is .*, not true or false") as error:
        parse_judged({**ROW, "label": label})
    assert error.value.reason == "not a label"
    assert ("null" in str(error.value)) == (label is None)


def test_no_label_at_all() -> None:
    with pytest.raises(RowError, match="nobody judged"):
        parse_judged({"prompt": "Q", "completion": "A"})


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_a_conversation_with_a_label_is_its_last_answer(name: str) -> None:
    turns = [USER, GOOD, {"role": "user", "content": "sort d c"}, {"role": "assistant", "content": "c d"}]
    row = {name: turns, "label": False, "source": "x"}
    expected = UnpairedRow(turns[:3], turns[3], False)
    assert parse_taken(row, "auto", KTO) == expected
    assert parse_taken(row, "auto", KTO).columns == ("source",)
    assert isinstance(parse_taken(row, "auto", ("pairs", "conversations")), ConversationRow)
    with pytest.raises(RowError, match="ends with a message of role 'user'"):
        parse_judged({name: turns[:3], "label": True})


def test_an_empty_answer_cannot_be_judged() -> None:
    with pytest.raises(RowError, match="the answer is empty"):
        parse_judged({**ROW, "completion": [{"role": "assistant", "content": " "}]})


def test_losses_of_pairs_say_who_takes_labels() -> None:
    with pytest.raises(RowError, match="loss=kto trains on such rows"):
        parse_preference(ROW)


def test_answers_are_laid_as_those_of_pairs(load: Callable[..., Any]) -> None:
    """Ids of a pair's answers, whether they come in it, as two rows with labels, or among such rows."""
    pairs = load([PAIR], "pairs.jsonl")
    assert (pairs.kind, pairs[0].desirable) == ("pairs", None)
    as_answers = [
        {"prompt": PAIR["prompt"], "completion": PAIR[side], "label": side == "chosen"}
        for side in ("chosen", "rejected")
    ]
    alone, mixed = load(as_answers, "alone.jsonl"), load([ROW, PAIR, BAD], "mixed.jsonl")
    assert (alone.kind, mixed.kind, len(mixed), mixed.num_responses) == ("answers", "answers", 4, 1)
    for data, first in ((alone, 0), (mixed, 1)):
        for place, label in ((0, True), (1, False)):
            found = data[first + place]
            assert found.prompt_ids == pairs[0].prompt_ids
            assert [response.ids for response in found.responses] == [pairs[0].responses[place].ids]
            assert found.desirable == label
    assert [mixed[place].desirable for place in range(4)] == [True, True, False, False]
    assert [mixed.example_id(place) for place in (1, 2)] == ["pair", "pair/rejected"]
    lengths = [[len(mixed[place].prompt_ids), len(mixed[place].responses[0].ids), 0] for place in range(4)]
    assert mixed.lengths[:].tolist() == lengths
    assert "train: 4 answers (2 desirable, 2 undesirable)" in str(mixed.summary)
    assert mixed.summary.length_percentiles["answer"][100] == max(length[1] for length in lengths)
    assert "answer with the label true" in mixed.example_text()


def test_labels_count_as_often_as_rows_come(
    tiny: PreTrainedTokenizerBase, data_config: Callable[..., Any], write_jsonl: Callable[..., Any]
) -> None:
    paths = [write_jsonl([ROW, BAD, BAD], "a.jsonl"), write_jsonl([PAIR], "b.jsonl")]
    config = data_config(paths, weights=[2.0, 1.0])
    data = load_preference_dataset(config, config.train, tiny, takes=KTO)
    labels = [data[place].desirable for place in range(len(data))]
    assert (data.summary.pairs, data.summary.desirable) == (8, 3) == (len(labels), sum(labels))


def test_labels_are_part_of_the_data(load: Callable[..., Any]) -> None:
    """A resume with other labels would train on something else."""
    one, other = load([ROW, BAD], "a/b.jsonl".replace("/", "_")), load([ROW, {**BAD, "label": 1}], "c.jsonl")
    assert one.token_hash() != other.token_hash()
    assert load([PAIR], "d.jsonl", kind="answers").token_hash() != load([PAIR], "d.jsonl").token_hash()


def test_a_long_answer_of_a_pair_is_left_out_alone(load: Callable[..., Any]) -> None:
    """Of a pair that fits no row, the answer that fits one stays."""
    long = {**PAIR, "rejected": " ".join("abcdefgh" * 3)}
    data = load([ROW, long], "long.jsonl", row_tokens=20, on_bad_row="skip")
    assert [data[place].desirable for place in range(len(data))] == [True, True]
    assert data.summary.dropped == {"longer than data.row_tokens": 1}
    with pytest.raises(DataError, match="answer 'pair/rejected' takes"):
        load([ROW, long], "long.jsonl", row_tokens=20)


def test_training_and_validation_are_of_one_kind(load: Callable[..., Any]) -> None:
    assert load([PAIR], "a.jsonl", kind="answers").kind == "answers"
    with pytest.raises(DataError, match=r"holds answers with a label and data.train.path pairs"):
        load([ROW], "b.jsonl", kind="pairs")
    with pytest.raises(DataError, match="no loss trains on both"):
        load([ROW, {"messages": [USER, GOOD]}], "c.jsonl", takes=("pairs", "conversations", "labels"))
    with pytest.raises(DataError, match="lays pairs only"):
        load([ROW], "d.jsonl", compat="released_code")


def test_labels_of_parquet(load: Callable[..., Any], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([ROW, {**ROW, "label": False}]).to_parquet(str(path))
    data = load([], path=str(path))
    assert [data[place].desirable for place in range(2)] == [True, False]


def test_the_command_shows_labels(
    write_jsonl: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_jsonl([ROW, BAD, PAIR])
    assert cli.main(["data", path, "--tokenizer", "builtin:tiny", "--rows", "4"]) == 0
    page = capsys.readouterr().out
    assert "train: 4 answers (2 desirable, 2 undesirable)" in page
    assert page.count("answer with the label false") == page.count("answer with the label true") == 2
    assert cli.main(["data", path]) == 0
    assert "2 labelled answers, 1 pair" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "size"), [(12, 4), (14, 4), (7, 3), (3, 4), (5, 1), (4, 4), (1, 4)])
def test_every_answer_goes_to_one_other_prompt_of_its_batch(number: int, size: int) -> None:
    order = epoch_order(number, 3, 0)
    found = partners(order, size)
    assert sorted(found.tolist()) == list(range(number))
    assert number == 1 or all(found[place] != place for place in range(number))
    for start in range(0, number - size + 1, size) if size > 1 else ():
        batch = order[start : start + size].tolist()
        if start + 2 * size <= number:  # the last batch takes the rest in
            assert [found[place] for place in batch] == [batch[-1], *batch[:-1]]


def test_mismatched_answers(load: Callable[..., Any]) -> None:
    rows = [ROW, {**BAD, "completion": " ".join("abcdefghij")}, {**ROW, "prompt": "sort " + " ".join("klmnop")}]
    data = load(rows, "rows.jsonl")
    found = np.array([1, 2, 0], dtype=np.int32)
    mismatched = MismatchedAnswers(data, found, max_length=14, row_tokens=64)
    for place in range(3):
        example, own = mismatched[place], data[place]
        room = 14 - len(own.prompt_ids)
        assert (example.prompt_ids, example.desirable) == (own.prompt_ids, own.desirable)
        assert example.responses[0].ids == data[int(found[place])].responses[0].ids[:room]
        assert mismatched.lengths[place].tolist() == [len(own.prompt_ids), len(example.responses[0].ids), 0]
    assert len(mismatched[0].responses[0].ids) < len(data[1].responses[0].ids)
    assert np.asarray(mismatched.lengths).tolist() == mismatched.lengths[np.arange(3)].tolist()
    fitting = MismatchedAnswers(data, found, max_length=64, row_tokens=9)
    assert all(sum(fitting.lengths[place].tolist()) - 1 <= 9 for place in range(3) if fitting.lengths[place][0] <= 9)
    other = MismatchedAnswers(data, np.roll(found, 1), max_length=14, row_tokens=64)
    prints = {mismatched.fingerprint, other.fingerprint, fitting.fingerprint, data.fingerprint}
    assert len(prints) == 4
    mismatched.attach_reference(np.array([[-1.0], [-2.0], [-3.0]]))
    assert [mismatched[place].responses[0].reference_logp for place in range(3)] == [-1.0, -2.0, -3.0]


def test_the_builtin_set_is_in_trl_form(load: Callable[..., Any]) -> None:
    from nemo_lmpo.data.builtin.tiny_task import builtin_rows, is_right

    rows = builtin_rows("tiny_unpaired", "test")
    assert {tuple(row) for row in rows} == {("prompt_id", "prompt", "completion", "label")}
    assert json.dumps(rows) == json.dumps(builtin_rows("tiny_unpaired", "test"))
    assert all(is_right(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in rows if row["label"])
    assert 0.5 < sum(row["label"] for row in rows) / len(rows) < 0.7
