from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants as constants
import pytest

from nemo_lmpo.config.schema import DataConfig
from nemo_lmpo.data.first_look import look_at_data
from nemo_lmpo.data.hub import cache_only_without_network, is_cached_dataset
from nemo_lmpo.data.read import Source, open_source
from nemo_lmpo.data.tokenizer import load_tokenizer
from nemo_lmpo.errors import ConfigError, DataError


@pytest.fixture
def resolves(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def set_up(known: bool) -> None:
        def getaddrinfo(host: str, port: int) -> None:
            assert (host, port) == ("huggingface.co", 443)
            if not known:
                raise socket.gaierror("not known")

        monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)

    return set_up


def test_cache_only_where_the_host_is_unknown_and_only_inside(
    resolves: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    resolves(known=False)
    with cache_only_without_network():
        assert constants.HF_HUB_OFFLINE
        assert datasets.config.HF_HUB_OFFLINE
    assert before == (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:8080")
    with cache_only_without_network():
        assert before == (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)


def test_network_is_used_where_there_is_one(resolves: Callable[..., Any]) -> None:
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    resolves(known=True)
    with cache_only_without_network():
        assert before == (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)


def test_errors_come_at_once_without_network(resolves: Callable[..., Any]) -> None:
    resolves(known=False)
    with pytest.raises(DataError, match=r"nobody/no-such-data .*could not be loaded from the hub"):
        open_source("nobody/no-such-data", "train")
    with pytest.raises(ConfigError, match=r"model\.tokenizer=nobody/no-such-tokenizer cannot be loaded"):
        load_tokenizer("nobody/no-such-tokenizer")


ROWS = [{"prompt": f"p{k}", "chosen": "a", "rejected": "b"} for k in range(5)]
README = """---
configs:
- config_name: short
  data_files: [{split: train_prefs, path: short/train.jsonl}]
- config_name: long
  data_files: [{split: train_prefs, path: long/*.jsonl}]
---
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resolves: Callable[..., Any]) -> Path:
    """An empty hub cache on a machine without network."""
    resolves(known=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def download(cache: Path, kind: str, name: str, files: dict[str, str]) -> Path:
    """What `hf download` leaves: https://huggingface.co/docs/huggingface_hub/guides/manage-cache."""
    root = cache / f"{kind}--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / ("1" * 40)
    for number, (path, content) in enumerate(files.items()):
        blob = root / "blobs" / f"{number:040x}"
        for place in (blob, snapshot / path):
            place.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(content)
        (snapshot / path).symlink_to(blob)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("1" * 40)
    return snapshot


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def values(source: Source) -> list[dict[str, Any]]:
    return [row.value for row in source.read()]


def test_what_hf_download_fetched_is_found_without_network(cache: Path) -> None:
    assert not is_cached_dataset("Owner/someData")
    snapshot = download(cache, "datasets", "Owner/someData", {"data/train.jsonl": lines(ROWS), "README.md": "# x"})
    assert is_cached_dataset("Owner/someData")
    source = open_source("Owner/someData", "train")
    assert values(source) == ROWS
    assert source.short_name == "Owner/someData"
    # The same as the folder given by its path, and of its content alone.
    again = open_source(str(snapshot), "train")
    assert values(again) == ROWS
    assert again.fingerprint == source.fingerprint
    assert values(open_source("Owner/someData", "train", limit=2)) == ROWS[:2]
    with pytest.raises(DataError, match=r"Owner/someData \(split 'dev'\) is a directory that cannot .*dev"):
        open_source("Owner/someData", "dev")


def test_configurations_have_a_name(cache: Path) -> None:
    files = {"README.md": README, "short/train.jsonl": lines(ROWS[:2]), "long/a.jsonl": lines(ROWS[2:])}
    download(cache, "datasets", "owner/both", files)
    assert values(open_source("owner/both:short", "train_prefs")) == ROWS[:2]
    assert values(open_source("owner/both:long", "train_prefs")) == ROWS[2:]
    with pytest.raises(DataError, match=r"owner/both .*(short.*long|long.*short)"):
        open_source("owner/both", "train_prefs")
    with pytest.raises(DataError, match=r"owner/both:none .*none"):
        open_source("owner/both:none", "train_prefs")


def test_validation_looks_into_the_cache(cache: Path) -> None:
    download(cache, "datasets", "owner/bad", {"train.jsonl": lines([{**ROWS[0], "chosen": ""}])})
    config = DataConfig()
    config.train.path, config.train.split = "owner/bad", "train"
    config.validation.path = None
    with pytest.raises(DataError, match="owner/bad row 1"):
        look_at_data(config, None)
    config.train.path = "owner/elsewhere"
    assert look_at_data(config, None)[0] == ["owner/elsewhere"]


def test_files_of_a_pattern_are_one_source(cache: Path, tmp_path: Path) -> None:
    for path in ("data/*.jsonl", "part-?.parquet", "[ab].csv"):
        with pytest.raises(DataError, match="matches no file; correct the pattern"):
            open_source(path, "train")
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for name, some in {"data/b.jsonl": ROWS[2:4], "data/a.jsonl": ROWS[:2], "data/deep/c.jsonl": ROWS[4:]}.items():
        (tmp_path / name).write_text(lines(some))
    source = open_source("data/*.jsonl", "train")
    assert values(source) == ROWS[:4]
    assert [source.location(row.number) for row in source.read()] == [
        f"data/{name}.jsonl line {number}" for name in "ab" for number in (1, 2)
    ]
    assert values(open_source("data/**/*.jsonl", "train")) == ROWS
    assert values(open_source("data/*.jsonl", "train", limit=3)) == ROWS[:3]
    for name, some in {"x-1.parquet": ROWS[3:], "x-0.parquet": ROWS[:3]}.items():
        datasets.Dataset.from_list(some).to_parquet(tmp_path / "data" / name)
    assert values(open_source("data/x-*.parquet", "train")) == ROWS
    with pytest.raises(DataError, match=r"data/\*.\* matches Parquet and text files"):
        open_source("data/*.*", "train")
    before = source.fingerprint
    (tmp_path / "data" / "b.jsonl").write_text(lines(ROWS[2:3]))
    assert open_source("data/*.jsonl", "train").fingerprint != before


def test_a_folder_of_parquet_files_is_one_source(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for name, some in {"train-00001.parquet": ROWS[3:], "train-00000.parquet": ROWS[:3]}.items():
        datasets.Dataset.from_list(some).to_parquet(tmp_path / "shards" / name)
    assert values(open_source("shards", "train")) == ROWS


def test_a_folder_gives_its_own_rows_and_those_of_now(tmp_path: Path, cache: Path) -> None:
    """Not those of another folder of its name, or those that were in it, which `datasets` keeps under the same key."""
    readme = "---\nconfigs:\n- config_name: default\n  data_files: pairs.jsonl\n---\n"
    found = []
    for place, rows in (("one", ROWS[:2]), ("other", ROWS[:3]), ("one", ROWS[:1])):
        folder = tmp_path / place / "pairs"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(readme)
        (folder / "pairs.jsonl").write_text(lines(rows))
        found.append(len(list(open_source(str(folder), "train").read())))
    assert found == [2, 3, 1]
