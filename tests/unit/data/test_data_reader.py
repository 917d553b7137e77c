from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Never

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_lmpo.data.messages import RowError
from nemo_lmpo.data.read import Source, open_source
from nemo_lmpo.data.text import TextFormat
from nemo_lmpo.errors import DataError
from tests.unit.data.pair_rows import message_row

ROWS = [message_row(f"Q{i}", f"good {i}", f"bad {i}", prompt_id=f"p{i}") for i in range(5)]


def values(source: Source) -> list[Any] | None:
    return [row.value for row in source.read()]


@pytest.fixture(params=["jsonl", "jsonl.gz", "json", "parquet", "saved", "saved splits"])
def stored(request: pytest.FixtureRequest, tmp_path: Path, write_jsonl: Callable[..., str]) -> str:
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


def test_every_form_gives_the_same_rows(stored: str) -> None:
    source = open_source(stored, "train")
    assert values(source) == ROWS
    assert values(source) == ROWS, "reading starts again from the first row"
    assert [row.number for row in source.read()] == [1, 2, 3, 4, 5]
    assert values(open_source(stored, "train", limit=2)) == ROWS[:2]
    assert open_source(stored, "train").fingerprint == source.fingerprint
    assert open_source(stored, "train", limit=2).fingerprint != source.fingerprint


def test_splits_of_a_saved_dictionary(tmp_path: Path) -> None:
    parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    test = open_source(str(tmp_path / "both"), "test")
    assert values(test) == ROWS[:1]
    assert test.fingerprint != open_source(str(tmp_path / "both"), "train").fingerprint
    with pytest.raises(DataError, match="no split 'validation'; its splits are: train, test"):
        open_source(str(tmp_path / "both"), "validation")


def test_fingerprint_follows_the_content_not_the_place(write_jsonl: Callable[..., str], tmp_path: Path) -> None:
    first = open_source(write_jsonl(ROWS), "train").fingerprint
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    Path(tmp_path / "pairs.jsonl").rename(moved / "pairs.jsonl")
    assert open_source(str(moved / "pairs.jsonl"), "train").fingerprint == first
    assert open_source(write_jsonl([*ROWS[:4], {**ROWS[4], "prompt_id": "x"}]), "train").fingerprint != first


def test_blank_lines_do_not_count_as_rows_but_as_lines(write_jsonl: Callable[..., str]) -> None:
    rows = list(open_source(write_jsonl([ROWS[0], "", ROWS[1]]), "train").read())
    assert [(row.number, row.value) for row in rows] == [(1, ROWS[0]), (3, ROWS[1])]


def test_broken_lines_are_rows_that_say_what_is_wrong(write_jsonl: Callable[..., str]) -> None:
    path = write_jsonl([ROWS[0], '{"prompt": "x", ', ROWS[1]])
    broken = list(open_source(path, "train").read())[1]
    assert isinstance(broken.value, RowError)
    assert broken.value.reason == "broken JSON"
    assert "column" in broken.value.detail
    assert open_source(path, "train").location(broken.number) == f"{path} line 2"
    with Path(path).open("ab") as stream:
        stream.write(b'{"prompt": "\xff"}\n')
    assert "not UTF-8" in list(open_source(path, "train").read())[3].value.detail


def test_truncated_download(write_jsonl: Callable[..., str]) -> None:
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


def test_what_is_not_there_or_not_readable(tmp_path: Path, write_jsonl: Callable[..., str]) -> None:
    with pytest.raises(DataError, match=r"missing\.jsonl does not exist"):
        open_source("missing.jsonl", "train")
    with pytest.raises(DataError, match=r"\./x does not exist"):
        open_source("./x", "train")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(DataError, match=r"empty\.jsonl is empty"):
        open_source(str(empty), "train")
    (tmp_path / "pairs.xlsx").write_text("a,b")
    with pytest.raises(DataError, match=r"unknown ending; give JSON lines, .*CSV"):
        open_source(str(tmp_path / "pairs.xlsx"), "train")
    (tmp_path / "pairs.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        values(open_source(str(tmp_path / "pairs.parquet"), "train"))
    with pytest.raises(DataError, match=r"cannot be read as a dataset .*save_to_disk wrote or `hf download"):
        open_source(str(tmp_path), "train")


DOCUMENTS = {
    "array": json.dumps(ROWS),
    "indented array": json.dumps(ROWS, indent=2),
    "a row a line in brackets": "[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]\n",
    "indented objects": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "byte order mark": "\ufeff" + json.dumps(ROWS, indent=1),
}


@pytest.mark.parametrize("form", DOCUMENTS)
@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl", "pairs.json.gz"])
def test_json_documents_are_their_rows(form: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    content = DOCUMENTS[form].encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    source = open_source(str(path), "train")
    assert values(source) == ROWS
    assert [row.number for row in source.read()] == [1, 2, 3, 4, 5]
    assert source.location(4) == f"{path} row 4"
    assert values(open_source(str(path), "train", limit=2)) == ROWS[:2]


def test_one_indented_object_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "pair.json").write_text(json.dumps(ROWS[0], indent=4))
    assert values(open_source(str(tmp_path / "pair.json"), "train")) == ROWS[:1]


@pytest.mark.parametrize("first", ["{broken", "[1, 2", "[1, 2]", "{", "["])
def test_lines_with_a_bad_first_one_stay_lines(first: str, write_jsonl: Callable[..., str]) -> None:
    source = open_source(write_jsonl([first, *ROWS], "pairs.json"), "train")
    bad, *good = source.read()
    assert bad.number == 1
    assert isinstance(bad.value, RowError) or bad.value == [1, 2]
    assert [(row.number, row.value) for row in good] == [(i + 2, row) for i, row in enumerate(ROWS)]
    assert source.unit == "line"


TEXTS = [
    {"prompt_id": f"p{i}", "prompt": f'say "{i}",\n\nplease', "chosen": f"gut, é{i}", "rejected": f"{i}"}
    for i in range(4)
]


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.CSV", "pairs.tsv", "pairs.csv.gz", "pairs.csv.zst"])
def test_tables(name: str, tmp_path: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, TEXTS[0], delimiter="\t" if "tsv" in name else ",")
    writer.writeheader()
    writer.writerows(TEXTS)
    write_compressed(tmp_path / name, ("\ufeff" + text.getvalue()).encode())
    source = open_source(str(tmp_path / name), "train")
    assert values(source) == TEXTS, "texts stay texts, also those that look like numbers"
    assert [row.number for row in source.read()] == [4, 7, 10, 13], "the lines on which the rows end"


def write_compressed(path: Path, content: bytes) -> None:
    if path.name.endswith(".zst"):
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)


def test_tables_that_are_broken(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected\nq,a,b\nq,a\nq,a,b,c\n")
    good, short, long = values(open_source(str(path), "train"))
    assert good == {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert short["rejected"] is None
    assert "more cells" in next(iter(long))
    path.write_text('prompt,chosen,rejected\nq,a,"b\n')
    with pytest.raises(DataError, match=r"pairs.csv line 2: the table is broken"):
        values(open_source(str(path), "train"))
    path.write_bytes(b"prompt,chosen,rejected\nq,a,\xff\n")
    with pytest.raises(DataError, match=r"pairs.csv line 2 is not UTF-8"):
        values(open_source(str(path), "train"))


@pytest.mark.parametrize("name", ["PAIRS.JSONL", "pairs.Json", "pairs.jsonl.zst", "pairs.ndjson.GZ"])
def test_endings_in_any_letters_and_compressions(name: str, tmp_path: Path) -> None:
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    write_compressed(tmp_path / name.replace("GZ", "gz"), content)
    (tmp_path / name.replace("GZ", "gz")).rename(tmp_path / name)
    assert values(open_source(str(tmp_path / name), "train")) == ROWS


def test_zstd_that_breaks_off(tmp_path: Path) -> None:
    content = "".join(json.dumps({"n": i, "t": os.urandom(20).hex()}) + "\n" for i in range(9000)).encode()
    write_compressed(tmp_path / "pairs.jsonl.zst", content)
    whole = (tmp_path / "pairs.jsonl.zst").read_bytes()
    (tmp_path / "pairs.jsonl.zst").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"pairs.jsonl.zst is damaged after line [1-9]\d* \(Truncated"):
        values(open_source(str(tmp_path / "pairs.jsonl.zst"), "train"))
    (tmp_path / "pairs.jsonl.zst").write_bytes(b"no zstd")
    with pytest.raises(DataError, match="is damaged after line 0"):
        values(open_source(str(tmp_path / "pairs.jsonl.zst"), "train"))


def test_numbers_with_more_digits_than_python_reads(write_jsonl: Callable[..., str]) -> None:
    path = write_jsonl(['{"prompt": ' + "7" * 5000 + "}", ROWS[0]])
    bad, good = values(open_source(path, "train"))
    assert bad.reason == "broken JSON"
    assert "too many digits" in bad.detail
    assert good == ROWS[0]


def test_text_of_a_parquet_file_that_is_not_utf8(tmp_path: Path) -> None:
    raw = pa.StringArray.from_buffers(3, *pa.array([b"good", b"\xff\xfe", b"more"], pa.binary()).buffers()[1:])
    table = pa.table({"prompt": raw, "chosen": pa.array(["a"] * 3), "rejected": pa.array(["b"] * 3)})
    pq.write_table(table, tmp_path / "pairs.parquet")
    first, bad, last = values(open_source(str(tmp_path / "pairs.parquet"), "train"))
    assert first["prompt"] == "good"
    assert last["prompt"] == "more"
    assert bad.reason == "not text"
    assert "not UTF-8" in bad.detail


def test_paths_that_no_system_takes() -> None:
    for path in ("x" * 5000 + ".jsonl", "a\0b.jsonl", "/" + "y" * 300):
        with pytest.raises(DataError) as caught:
            open_source(path, "train")
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500


def test_damaged_saved_dataset(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"broken")
    with pytest.raises(DataError, match="not a readable saved dataset"):
        open_source(str(tmp_path / "saved"), "train")


def test_saved_dataset_without_rows(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}).save_to_disk(tmp_path / "none")
    with pytest.raises(DataError, match="holds no rows"):
        open_source(str(tmp_path / "none"), "train")


def test_hub_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, split: str) -> Any:
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source("owner/name", "train_prefs")
    assert asked == [("owner/name", "train_prefs")]
    assert values(source) == ROWS
    assert source.short_name == "owner/name"

    def fail(name: str, split: str) -> Never:
        raise ValueError('Unknown split "dev". Should be one of [train].\nmore')

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"owner/name \(split 'dev'\).*Unknown split .* local file"):
        open_source("owner/name", "dev")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty.jsonl", "{path} is empty; give a file with preference pairs"),
        ("pairs.doc", "{path} has an unknown ending; give "),
        ("saved", "{path} has no split 'tset'; its splits are: train"),
    ],
)
def test_what_is_wrong_with_a_path_is_said_once(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "pairs.doc").write_text("x")
    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"prompt": "q"}])}).save_to_disk(tmp_path / "saved")
    path = str(tmp_path / name)
    with pytest.raises(DataError) as error:
        open_source(path, "tset")
    assert str(error.value).startswith(message.format(path=path))


def test_libraries_write_no_progress_into_a_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], write_jsonl: Callable[..., str]
) -> None:
    """Their bars are one endless line there, of carriage returns."""
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    capfd.readouterr()
    for path in (write_jsonl(rows), str(tmp_path / "pairs.parquet")):
        assert len(list(open_source(path, "train").read())) == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "delimiter", "settings"),
    [
        ("a.csv", ";", TextFormat()),
        ("a.csv", "\t", TextFormat()),
        ("a.tsv", "|", TextFormat()),
        ("a.csv", ",", TextFormat(delimiter=",")),
        ("a.csv", "\t", TextFormat(delimiter="tab")),
        ("a.csv", "^", TextFormat(delimiter="^")),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "utf-16"])
def test_delimiters_and_encodings(
    tmp_path: Path, name: str, delimiter: str, settings: TextFormat, encoding: str
) -> None:
    path = tmp_path / name
    row = {"prompt": "Caf\u00e9, or; tea\n|\t^?", "chosen": "\u00fc", "rejected": "a\u2019b"}
    with path.open("w", encoding=encoding, newline="") as stream:
        writer = csv.DictWriter(stream, row, delimiter=delimiter)
        writer.writeheader()
        writer.writerow(row)
    source = open_source(str(path), "train", form=replace(settings, encoding=encoding))
    assert [raw.value for raw in source.read()] == [row]
    plain = open_source(str(path), "train", form=settings)
    assert (source.fingerprint == plain.fingerprint) == (encoding == "utf-8")
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding=encoding)
    source = open_source(str(lines), "train", form=TextFormat(encoding))
    assert [raw.value for raw in source.read()] == [row]


def test_other_encodings_are_named(tmp_path: Path) -> None:
    row = '{"prompt": "Caf\u00e9"}\n'
    (tmp_path / "a.jsonl").write_text(row, encoding="latin-1")
    (raw,) = open_source(str(tmp_path / "a.jsonl"), "train").read()
    assert "looks like Latin-1 or Windows text (with '\u00e9')" in str(raw.value)
    assert "data.train.encoding=cp1252" in str(raw.value)
    (tmp_path / "a.csv").write_text("prompt,chosen\ncaf\u00e9,x\n", encoding="latin-1")
    with pytest.raises(DataError, match=r"a.csv line 2 .*Latin-1.*data.train.encoding=cp1252"):
        list(open_source(str(tmp_path / "a.csv"), "train").read())
    (tmp_path / "w.csv").write_text("prompt,chosen\n", encoding="utf-16")
    with pytest.raises(DataError, match=r"UTF-16.*data.train.encoding=utf-16"):
        list(open_source(str(tmp_path / "w.csv"), "train").read())
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"is not ascii text after line 0 .*correct data.train.encoding"):
        list(open_source(str(tmp_path / "b.jsonl"), "train", form=TextFormat("ascii")).read())
    (tmp_path / "c.csv").write_text("a;b|c\n")
    with pytest.raises(DataError, match=r"may be split at ';', '\|'; set data.train.delimiter"):
        list(open_source(str(tmp_path / "c.csv"), "train").read())
