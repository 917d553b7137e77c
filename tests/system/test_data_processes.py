"""Data that several processes load at once, or that several processes tokenize."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.config.schema import DataConfig, DatasetConfig
from nemo_lmpo.data import tokenize
from nemo_lmpo.data.preference import PreferenceDataset, load_preference_dataset
from nemo_lmpo.data.tokenizer import load_tokenizer
from nemo_lmpo.errors import DataError


def load(config: DataConfig) -> PreferenceDataset | None:
    return load_preference_dataset(config, config.train, load_tokenizer("builtin:tiny"))


@pytest.fixture
def data_config(tmp_path: Path) -> Callable[..., Any]:
    def make(path: str, *, limit: int | None = None, **changes: Any) -> DataConfig:
        settings = {"max_length": 64, "max_prompt_length": 32, "num_workers": 1, "cache_dir": str(tmp_path / "cache")}
        return DataConfig(train=DatasetConfig(path=path, limit=limit), **{**settings, **changes})

    return make


def _load_in_process(config: Any, results: Any, start: Any) -> None:
    start.wait()
    data = load(config)
    results.put((data.fingerprint, len(data), data[3].responses[0].ids))


def test_several_processes_at_once(data_config: Callable[..., DataConfig], tmp_path: Path) -> None:
    config = data_config("builtin:tiny")
    context = multiprocessing.get_context("spawn")
    results, start = context.Queue(), context.Event()
    processes = [context.Process(target=_load_in_process, args=(config, results, start)) for _ in range(2)]
    for process in processes:
        process.start()
    start.set()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert found[0] == found[1]
    assert found[0][1] == 4096
    assert len(list((tmp_path / "cache" / "pairs").iterdir())) == 2, "one entry and its lock, nothing half-built"


def test_workers_give_the_pairs_of_one_process(
    data_config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one = load(data_config("builtin:tiny", limit=600))
    monkeypatch.setattr(tokenize, "SMALL_DATA_ROWS", 256)
    monkeypatch.setattr(tokenize, "_cpu_cores", lambda: 2)
    many = load(data_config("builtin:tiny", limit=600, num_workers=None, cache_dir=str(tmp_path / "other")))
    (entry,) = (tmp_path / "other" / "pairs").glob("*/")
    assert len(list(entry.glob("pairs*.arrow"))) == 2
    assert [many[i] for i in range(600)] == [one[i] for i in range(600)]
    assert many.fingerprint == one.fingerprint
    assert many.token_hash() == one.token_hash()
    load(data_config("builtin:tiny", limit=256, num_workers=None))
    assert {len(list(entry.glob("pairs*.arrow"))) for entry in (tmp_path / "cache" / "pairs").glob("*/")} == {1}


def test_error_with_workers_is_the_same(data_config: Callable[..., DataConfig], tmp_path: Path) -> None:
    rows = [{"prompt": "sort b a", "chosen": "a b", "rejected": f"b {i}"} for i in range(600)]
    rows[500] = {"prompt": "q"}
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"pairs.jsonl line 501: the row is of no known layout .*on_bad_row=skip"):
        load(data_config(str(path), num_workers=2))


def _die(*_: Any) -> None:
    os._exit(1)


def test_workers_that_die(data_config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize.RowsToPairs, "__call__", _die)
    # the class goes to the workers by name, so it has to be another one there, too
    monkeypatch.setattr(tokenize, "RowsToPairs", DyingJob)
    with pytest.raises(DataError, match=r"process that tokenizes died .*data\.num_workers=1"):
        load(data_config("builtin:tiny", limit=10, num_workers=2))


class DyingJob(tokenize.RowsToPairs):
    __call__: Any = _die
