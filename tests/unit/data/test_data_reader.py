import gzip
from pathlib import Path

import datasets
import pytest
from pair_rows import message_row

from nemo_lmpo.data.read import open_source
from nemo_lmpo.data.schema import RowError
from nemo_lmpo.errors import DataError

ROWS = [message_row(f"Q{i}", f"good {i}", f"bad {i}", prompt_id=f"p{i}") for i in range(5)]


def values(source):
    return [row.value for row in source.read()]


@pytest.fixture(params=["jsonl", "jsonl.gz", "json", "parquet", "saved", "saved splits"])
def stored(request, tmp_path, write_jsonl):
    """The same rows in every form."""
    kind = request.param
    if kind.startswith("json"):
        return write_jsonl(ROWS, f"pairs.{kind}")
    dataset = datasets.Dataset.from_list(ROWS)
    path = tmp_path / f"pairs.{kind.replace(' ', '-')}"
    if kind == "parquet":
        dataset.to_parquet(path)
    elif kind == "saved":
        dataset.save_to_disk(path)
    else:
        other = datasets.Dataset.from_list(ROWS[:1])
        datasets.DatasetDict({"train": dataset, "test": other}).save_to_disk(path)
    return str(path)


def test_every_form_gives_the_same_rows(stored):
    source = open_source(stored, "train")
    assert values(source) == ROWS
    assert values(source) == ROWS, "reading starts again from the first row"
    assert [row.number for row in source.read()] == [1, 2, 3, 4, 5]
    assert values(open_source(stored, "train", limit=2)) == ROWS[:2]
    assert open_source(stored, "train").fingerprint == source.fingerprint
    assert open_source(stored, "train", limit=2).fingerprint != source.fingerprint


def test_splits_of_a_saved_dictionary(tmp_path):
    parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    test = open_source(str(tmp_path / "both"), "test")
    assert values(test) == ROWS[:1]
    assert test.fingerprint != open_source(str(tmp_path / "both"), "train").fingerprint
    with pytest.raises(DataError, match="no split 'validation'; its splits are: train, test"):
        open_source(str(tmp_path / "both"), "validation")


def test_fingerprint_follows_the_content_not_the_place(write_jsonl, tmp_path):
    first = open_source(write_jsonl(ROWS), "train").fingerprint
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    Path(tmp_path / "pairs.jsonl").rename(moved / "pairs.jsonl")
    assert open_source(str(moved / "pairs.jsonl"), "train").fingerprint == first
    assert open_source(write_jsonl([*ROWS[:4], {**ROWS[4], "prompt_id": "x"}]), "train").fingerprint != first


def test_blank_lines_do_not_count_as_rows_but_as_lines(write_jsonl):
    rows = list(open_source(write_jsonl([ROWS[0], "", ROWS[1]]), "train").read())
    assert [(row.number, row.value) for row in rows] == [(1, ROWS[0]), (3, ROWS[1])]


def test_broken_lines_are_rows_that_say_what_is_wrong(write_jsonl):
    path = write_jsonl([ROWS[0], '{"prompt": "x", ', ROWS[1]])
    broken = list(open_source(path, "train").read())[1]
    assert isinstance(broken.value, RowError)
    assert broken.value.reason == "broken JSON"
    assert "column" in broken.value.detail
    assert open_source(path, "train").location(broken.number) == f"{path} line 2"
    with Path(path).open("ab") as stream:
        stream.write(b'{"prompt": "\xff"}\n')
    assert "not UTF-8" in list(open_source(path, "train").read())[3].value.detail


def test_truncated_download(write_jsonl):
    path = write_jsonl([message_row(f"Q{i}" * 50, "a", "b") for i in range(2000)], "pairs.jsonl.gz")
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"pairs.jsonl.gz is damaged after line [1-9]\d*"):
        values(open_source(path, "train"))
    Path(path).write_bytes(b"no gzip")
    with pytest.raises(DataError, match="damaged after line 0"):
        values(open_source(path, "train"))
    Path(path).write_bytes(gzip.compress(b""))
    assert values(open_source(path, "train")) == []


def test_what_is_not_there_or_not_readable(tmp_path, write_jsonl):
    with pytest.raises(DataError, match=r"missing\.jsonl does not exist"):
        open_source("missing.jsonl", "train")
    with pytest.raises(DataError, match=r"\./x does not exist"):
        open_source("./x", "train")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(DataError, match=r"empty\.jsonl is empty"):
        open_source(str(empty), "train")
    (tmp_path / "pairs.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"unknown ending; supported: .jsonl"):
        open_source(str(tmp_path / "pairs.csv"), "train")
    (tmp_path / "pairs.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        values(open_source(str(tmp_path / "pairs.parquet"), "train"))
    with pytest.raises(DataError, match="save_to_disk did not write"):
        open_source(str(tmp_path), "train")
    with pytest.raises(DataError, match="one JSON array"):
        values(open_source(write_jsonl(["[", "{}", "]"], "array.json"), "train"))
    with pytest.raises(DataError, match="one JSON array"):
        values(open_source(write_jsonl(['[{"a": 1}]'], "array.json"), "train"))


def test_damaged_saved_dataset(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"broken")
    with pytest.raises(DataError, match="not a readable saved dataset"):
        open_source(str(tmp_path / "saved"), "train")


def test_saved_dataset_without_rows(tmp_path):
    datasets.Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}).save_to_disk(tmp_path / "none")
    with pytest.raises(DataError, match="holds no rows"):
        open_source(str(tmp_path / "none"), "train")


def test_hub_datasets(monkeypatch):
    asked = []

    def load(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source("owner/name", "train_prefs")
    assert asked == [("owner/name", "train_prefs")]
    assert values(source) == ROWS
    assert source.short_name == "owner/name"

    def fail(name, split):
        raise ValueError('Unknown split "dev". Should be one of [train].\nmore')

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"owner/name \(split 'dev'\).*Unknown split .* local file"):
        open_source("owner/name", "dev")
