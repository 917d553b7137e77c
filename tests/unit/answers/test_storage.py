"""Journals outlive kills; results say what they lack."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_lmpo.answers.identity import claim_folder
from nemo_lmpo.answers.journal import Journal
from nemo_lmpo.errors import ConfigError, DataError
from nemo_lmpo.evaluate.bootstrap import Interval
from nemo_lmpo.evaluate.result import (
    Judge,
    Model,
    Result,
    Value,
    read_result,
    read_units,
    relabel,
    write_result,
)
from nemo_lmpo.runtime.files import content_hash, read_lines


def test_half_a_line_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, "id") as journal:
        journal.extend([{"id": "a", "output": "one\u2028line\n"}, {"id": "b", "output": "two"}])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "c", "outp')
    with Journal(path, "id") as journal:
        assert list(journal.rows) == ["a", "b"]
        assert journal.rows["a"]["output"] == "one\u2028line\n"
        journal.append({"id": "c", "output": "three"})
    assert [row["id"] for row in read_lines(path)] == ["a", "b", "c"]


def test_every_cut_leaves_whole_rows(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, "id") as journal:
        journal.extend([{"id": str(index), "output": "ä" * index} for index in range(4)])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with Journal(path, "id") as journal:
            assert len(journal.rows) == whole[:length].count(b"\n")


def test_damage_in_the_middle_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"id": "a"}\n{"id": \n{"id": "c"}\n')
    with pytest.raises(DataError, match="line 2 is damaged"):
        Journal(path, "id")


def test_hash_does_not_depend_on_the_form() -> None:
    assert content_hash([["a", "ü/"]]) == content_hash(json.loads('[["a", "\\u00fc\\/"]]'))
    assert content_hash([["a", "b"]]) != content_hash([["b", "a"]])


def result(**changes: object) -> Result:
    made = Result(
        suite="arena_hard",
        model=Model("m", "runs/m", "training", "tiny", "LMPO"),
        values={"wr": Value(50.0, 1.0, {"bootstrap over instructions, 95 %": Interval(48.0, 52.0)})},
        n=500,
        of=500,
        unparsed=0,
        truncated=0,
        empty=0,
        judge=Judge("judge", {"judge-1": 1000}, "http://localhost/v1", "hash"),
        date="2026-11-24T00:00:00+00:00",
        generation={"temperature": 0},
        packages={"torch": "2"},
        evaluation_set={"name": "arena_hard", "sha256": "0"},
        command="python -m nemo_lmpo.evaluate",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_results_read_as_written(tmp_path: Path) -> None:
    write_result(tmp_path, result(), {"ids": ["a"]})
    found = read_result(tmp_path)
    assert replace(found, folder=None) == result()
    assert read_units(found) == {"ids": ["a"]}


def test_relabelling_keeps_the_numbers(tmp_path: Path) -> None:
    write_result(tmp_path, result(), {"ids": ["a"]})
    relabel(tmp_path, Model("other", "runs/m", "training", "tiny", "SimPO"))
    found = read_result(tmp_path)
    assert (found.model.method, found.values) == ("SimPO", result().values)


@pytest.mark.parametrize("name", ["judge", "generation", "packages", "evaluation_set", "command", "n", "unparsed"])
def test_results_that_lack_something_are_refused(tmp_path: Path, name: str) -> None:
    write_result(tmp_path, result(), {})
    path = tmp_path / "result.json"
    content = json.loads(path.read_text())
    del content[name]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"lacks {name}"):
        read_result(tmp_path)


def test_a_folder_takes_one_evaluation(tmp_path: Path) -> None:
    claim_folder(tmp_path, "settings.json", {"model": ("a", None), "generation": {"seed": 1}})
    claim_folder(tmp_path, "settings.json", {"model": ["a", None], "generation": {"seed": 1}})
    with pytest.raises(ConfigError, match=r"generation .*1.*, this one has .*2"):
        claim_folder(tmp_path, "settings.json", {"model": ("a", None), "generation": {"seed": 2}})
