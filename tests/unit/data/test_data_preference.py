from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Never

import datasets
import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from nemo_lmpo.config.schema import DataConfig, DatasetConfig
from nemo_lmpo.data import preference
from nemo_lmpo.data.cache import cache_root
from nemo_lmpo.data.pack import example_tokens
from nemo_lmpo.data.preference import PreferenceDataset, load_preference_dataset
from nemo_lmpo.data.summary import DataSummary, SourceSummary
from nemo_lmpo.errors import ConfigError, DataError
from nemo_lmpo.runtime.files import file_lock
from tests.unit.data.pair_rows import message_row

GOOD = [message_row(f"sort b a {'cdefghij'[i]}", "a b", "b a", prompt_id=f"p{i}") for i in range(8)]


def load(config: DataConfig, tokenizer: PreTrainedTokenizerBase, name: str = "train") -> PreferenceDataset | None:
    return load_preference_dataset(config, config.train, tokenizer, name=name)


def example_ids(data: PreferenceDataset) -> list[str]:
    return [data.example_id(index) for index in range(len(data))]


@pytest.fixture
def no_tokenising(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """After calling it, only the cache can give tokenized data."""

    def forbid() -> None:
        monkeypatch.setattr(preference, "tokenize_source", lambda *a, **k: pytest.fail("tokenized again"))

    return forbid


def test_pairs_as_their_rows_say(
    data_config: Callable[..., DataConfig], tiny: PreTrainedTokenizerBase, write_jsonl: Callable[..., str]
) -> None:
    data = load(data_config(write_jsonl(GOOD)), tiny)
    assert len(data) == 8
    pair = data[2]
    assert pair.example_id == "p2"
    assert tiny.decode(pair.prompt_ids) == "<bos> <user> sort b a e <assistant>"
    assert tiny.decode(pair.responses[0].ids) == "a b <eos>"
    assert tiny.decode(pair.responses[1].ids) == "b a <eos>"
    assert all(type(token) is int for token in pair.prompt_ids)
    assert data.lengths[:].tolist() == [[7, 3, 3]] * 8
    assert [data[i].example_id for i in range(8)] == example_ids(data) == [f"p{i}" for i in range(8)]
    example = data.example_text(2)
    assert "sort b a e" in example
    assert ">>>a b <eos><<<" in example
    assert ">>>b a <eos><<<" in example


def test_lengths_are_those_of_the_pairs(data_config: Callable[..., DataConfig], tiny: PreTrainedTokenizerBase) -> None:
    data = load(data_config("builtin:tiny", limit=50), tiny)
    for index, lengths in enumerate(np.asarray(data.lengths).tolist()):
        pair = data[index]
        assert lengths == [len(pair.prompt_ids), *(len(response.ids) for response in pair.responses)]
    for column, part in enumerate(("prompt", "chosen", "rejected")):
        found = np.percentile(np.asarray(data.lengths)[:, column], [50, 90, 99, 100], method="higher").tolist()
        assert list(data.summary.length_percentiles[part].values()) == found


def test_second_load_comes_from_the_cache(
    data_config: Callable[..., DataConfig],
    tiny: PreTrainedTokenizerBase,
    write_jsonl: Callable[..., str],
    no_tokenising: Callable[..., Any],
) -> None:
    config = data_config(write_jsonl(GOOD))
    first = load(config, tiny)
    no_tokenising()
    second = load(config, tiny)
    assert [second[i] for i in range(8)] == [first[i] for i in range(8)]
    assert second.fingerprint == first.fingerprint
    assert second.summary == first.summary


def test_whatever_changes_the_tokens_changes_the_fingerprint(
    data_config: Callable[..., DataConfig],
    tiny: PreTrainedTokenizerBase,
    write_jsonl: Callable[..., str],
    smollm2: PreTrainedTokenizerBase,
) -> None:
    path = write_jsonl(GOOD)
    prints = [load(data_config(path), tiny).fingerprint]
    for changes in (
        {"max_length": 63}, {"max_prompt_length": 31}, {"chat_template": "plain"}, {"system_prompt": "sort"},
        {"limit": 7}, {"weights": [0.5]}, {"schema": "messages"},
    ):  # fmt: skip
        prints.append(load(data_config(path, **changes), tiny).fingerprint)
    prints.append(load(data_config(path), smollm2).fingerprint)
    prints.append(load(data_config(write_jsonl([*GOOD[:7], {**GOOD[7], "prompt_id": "new"}])), tiny).fingerprint)
    assert len(set(prints)) == len(prints)


def test_token_hash_follows_the_tokens_only(
    data_config: Callable[..., DataConfig], tiny: PreTrainedTokenizerBase, write_jsonl: Callable[..., str]
) -> None:
    def hashed(rows: list[dict[str, Any]], name: str = "pairs.jsonl", **changes: Any) -> str:
        return load(data_config(write_jsonl(rows, name), **changes), tiny).token_hash()

    same = {hashed(GOOD), hashed(GOOD, "b.jsonl"), hashed([{**row, "prompt_id": "new"} for row in GOOD], max_length=63)}
    assert len(same) == 1
    other = [hashed(GOOD[::-1]), hashed(GOOD[:7]), hashed(GOOD, weights=[2.0]), hashed(GOOD, chat_template="plain")]
    moved = message_row("sort b a c a", "b", "b a")  # the same tokens behind each other as GOOD[0], cut elsewhere
    assert len({*same, *other, hashed([moved, *GOOD[1:]])}) == 6


def test_cache_is_readable_with_datasets(
    data_config: Callable[..., DataConfig],
    tiny: PreTrainedTokenizerBase,
    write_jsonl: Callable[..., str],
    tmp_path: Path,
) -> None:
    load(data_config(write_jsonl(GOOD)), tiny)
    (stored,) = (tmp_path / "cache").rglob("pairs.arrow")
    assert datasets.Dataset.from_file(str(stored))["example_id"] == [f"p{i}" for i in range(8)]


@pytest.mark.parametrize("damage", ["cut pairs", "no meta", "broken meta", "other count"])
def test_damaged_cache_is_built_again(
    data_config: Callable[..., DataConfig],
    tiny: PreTrainedTokenizerBase,
    write_jsonl: Callable[..., str],
    tmp_path: Path,
    damage: str,
) -> None:
    config = data_config(write_jsonl(GOOD))
    data = load(config, tiny)
    first = [data[i] for i in range(8)]
    del data  # it maps the file that is about to be damaged
    (stored,) = (tmp_path / "cache").rglob("pairs.arrow")
    meta = stored.parent / "meta.json"
    if damage == "cut pairs":
        stored.write_bytes(stored.read_bytes()[:400])
    elif damage == "no meta":
        meta.unlink()
    elif damage == "broken meta":
        meta.write_text("{")
    else:
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "pairs": 7}))
    again = load(config, tiny)
    assert [again[i] for i in range(8)] == first


@pytest.mark.parametrize("name", ["pairs.arrow", "rows.npy", "lengths.npy", "repeated.npy", "meta.json"])
def test_a_flipped_bit_anywhere_is_noticed(
    data_config: Callable[..., DataConfig],
    tiny: PreTrainedTokenizerBase,
    write_jsonl: Callable[..., str],
    tmp_path: Path,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = data_config(write_jsonl([*GOOD, *GOOD]))  # some ids are there twice
    data = load(config, tiny)
    first, hashed = [data[i] for i in range(16)], data.token_hash()
    del data  # it maps the file that is about to be damaged
    (path,) = (tmp_path / "cache").rglob(name)
    whole = path.read_bytes()
    # Not outside of what a JSON value is, which would be no JSON any more.
    places = [whole.index(b'"pairs"') + 9] if name == "meta.json" else range(0, len(whole), max(1, len(whole) // 25))
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        caplog.clear()
        again = load(config, tiny)
        assert "is damaged or of an earlier version; it is made again" in caplog.text, place
        assert ([again[i] for i in range(16)], again.token_hash()) == (first, hashed)
        del again


def test_leftovers_of_a_process_killed_over_other_data_are_removed(
    data_config: Callable[..., DataConfig],
    tiny: PreTrainedTokenizerBase,
    write_jsonl: Callable[..., str],
    tmp_path: Path,
) -> None:
    pairs = tmp_path / "cache" / "pairs"
    for key in ("gone", "working"):
        (pairs / f"{key}.tmp-abc").mkdir(parents=True)
        (pairs / f"{key}.tmp-abc" / "pairs.arrow").touch()
    with file_lock(pairs / "working.lock"):
        load(data_config(write_jsonl(GOOD)), tiny)
        assert not (pairs / "gone.tmp-abc").exists()
        assert (pairs / "working.tmp-abc" / "pairs.arrow").exists()


def test_leftovers_of_a_killed_process_are_removed(
    data_config: Callable[..., DataConfig],
    tiny: PreTrainedTokenizerBase,
    write_jsonl: Callable[..., str],
    tmp_path: Path,
) -> None:
    config = data_config(write_jsonl(GOOD))
    load(config, tiny)
    (stored,) = (tmp_path / "cache").rglob("pairs.arrow")
    leftover = stored.parent.with_name(stored.parent.name + ".tmp-killed")
    stored.parent.rename(leftover)
    load(config, tiny)
    assert not leftover.exists()
    assert stored.exists()


def test_cache_that_cannot_be_written(
    data_config: Callable[..., DataConfig],
    tiny: PreTrainedTokenizerBase,
    write_jsonl: Callable[..., str],
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be written .*data.cache_dir"):
        load(data_config(write_jsonl(GOOD), cache_dir=str(tmp_path / "file")), tiny)


def test_bad_rows_stop_the_run_or_are_counted(
    data_config: Callable[..., DataConfig], tiny: PreTrainedTokenizerBase, write_jsonl: Callable[..., str]
) -> None:
    path = write_jsonl(
        [GOOD[0], message_row("sort", "same", "same", prompt_id="x"), "{broken", GOOD[1], {"prompt": "q"}]
    )
    with pytest.raises(DataError, match=r"pairs.jsonl line 2: .* are equal \(pair 'x'\); .*data.on_bad_row=skip"):
        load(data_config(path), tiny)
    data = load(data_config(path, on_bad_row="skip"), tiny)
    assert example_ids(data) == ["p0", "p1"]
    assert data.summary.dropped == {"chosen equals rejected": 1, "broken JSON": 1, "unknown layout": 1}
    assert data.summary.sources[0].rows == 5
    assert "1 chosen equals rejected" in str(data.summary)
    with pytest.raises(DataError, match="line 2"):  # also when a skipping run has filled the cache
        load(data_config(path), tiny)


def test_broken_json_names_file_and_line(
    data_config: Callable[..., DataConfig], tiny: PreTrainedTokenizerBase, write_jsonl: Callable[..., str]
) -> None:
    with pytest.raises(DataError, match=r"pairs.jsonl.gz line 3: the JSON is broken: .* column"):
        load(data_config(write_jsonl([*GOOD[:2], '{"a": '], "pairs.jsonl.gz")), tiny)


def test_no_row_left(
    data_config: Callable[..., DataConfig], tiny: PreTrainedTokenizerBase, write_jsonl: Callable[..., str]
) -> None:
    same = message_row("sort", "same", "same")
    with pytest.raises(DataError, match=r"data.train.path=.*no row is left .*2 chosen equals rejected"):
        load(data_config(write_jsonl([same, same]), on_bad_row="skip"), tiny)
    with pytest.raises(DataError, match="holds no rows"):
        load(data_config(write_jsonl(["", ""])), tiny)
    with pytest.raises(DataError, match="no row is left"):
        load(data_config("builtin:tiny", weights=[0.0], limit=10), tiny)


def test_pair_longer_than_the_row_budget(
    data_config: Callable[..., DataConfig], tiny: PreTrainedTokenizerBase, write_jsonl: Callable[..., str]
) -> None:
    path = write_jsonl([GOOD[0], message_row("sort b a c d e f g", "a b", "b a", prompt_id="long")])
    # prompts of 7 and 11 tokens; with 3 + 3 - 2 more: 11 and 15, and 18 and 26 with the prompt twice
    with pytest.raises(DataError, match=r"pair 'long' takes 15 tokens, more than data.row_tokens=14"):
        load(data_config(path, row_tokens=14), tiny)
    data = load(data_config(path, row_tokens=14, on_bad_row="skip"), tiny)
    assert example_ids(data) == ["p0"]
    assert data.summary.dropped == {"longer than data.row_tokens": 1}
    assert len(load(data_config(path, row_tokens=15), tiny)) == 2
    with pytest.raises(DataError, match="pair 'p0' takes 18 tokens"):
        load(data_config(path, row_tokens=15, share_prompt=False), tiny)
    assert example_tokens(load(data_config(path), tiny).lengths[:], False).tolist() == [18, 26]


def test_pair_ids(
    data_config: Callable[..., DataConfig], tiny: PreTrainedTokenizerBase, write_jsonl: Callable[..., str]
) -> None:
    rows = [{**GOOD[i], "prompt_id": None} for i in range(3)]
    rows[1]["id"] = 77
    rows.append({**GOOD[3], "prompt_id": "77"})
    rows += [{**GOOD[4], "prompt_id": "\ud800"}, {**GOOD[5], "prompt_id": True, "id": ""}]
    data = load(data_config(write_jsonl(rows)), tiny)
    assert example_ids(data) == ["pairs.jsonl:1", "77", "pairs.jsonl:3", "77#4", "?", "pairs.jsonl:6"]


def test_sources_mixed_by_weight(
    data_config: Callable[..., DataConfig],
    tiny: PreTrainedTokenizerBase,
    write_jsonl: Callable[..., str],
    no_tokenising: Callable[..., Any],
) -> None:
    paths = [
        write_jsonl(GOOD, "a.jsonl"),
        write_jsonl([{**row, "prompt_id": f"q{i}"} for i, row in enumerate(GOOD)], "b.jsonl"),
    ]
    data = load(data_config(paths), tiny)
    assert example_ids(data) == [f"a:p{i}" for i in range(8)] + [f"b:q{i}" for i in range(8)]
    assert data.source_names == ["a", "b"]
    assert data.sources(np.array([[0, 7], [15, 8]])).tolist() == [[0, 0], [1, 1]]
    no_tokenising()  # other weights need no tokenizing
    data = load(data_config(paths, weights=[0.5, 2]), tiny)
    first = [example_id for example_id in example_ids(data) if example_id.startswith("a:")]
    assert len(first) == len(set(first)) == 4
    assert sorted(example_ids(data)[4:]) == sorted([f"b:q{i}" for i in range(8)] * 2)
    assert [source.used for source in data.summary.sources] == [4, 16]
    assert example_ids(load(data_config(paths, weights=[0.5, 2]), tiny)) == example_ids(data)
    assert len(load(data_config(paths, weights=[1.25, 0]), tiny)) == 10


def test_the_same_id_in_two_sources_stays_two_pairs(
    data_config: Callable[..., DataConfig],
    tiny: PreTrainedTokenizerBase,
    write_jsonl: Callable[..., str],
    tmp_path: Path,
) -> None:
    paths = [write_jsonl(GOOD[:1], "a.jsonl"), write_jsonl(GOOD[:1], "b.jsonl")]
    assert example_ids(load(data_config(paths), tiny)) == ["a:p0", "b:p0"]
    folder = tmp_path / "more"
    folder.mkdir()
    shutil.copy(paths[0], folder / "a.JSONL")
    assert example_ids(load(data_config([paths[0], str(folder / "a.JSONL")]), tiny)) == ["a:p0", "a_2:p0"]


def test_reference_log_probabilities(
    data_config: Callable[..., DataConfig], tiny: PreTrainedTokenizerBase, write_jsonl: Callable[..., str]
) -> None:
    path = write_jsonl(GOOD)
    data = load(data_config(path, weights=[1.5]), tiny)
    assert data[0].responses[0].reference_logp is None
    values = np.stack([-np.arange(12.0), -10 - np.arange(12.0)], axis=1)
    data.attach_reference(values)
    for index in range(len(data)):
        pair = data[index]
        assert [response.reference_logp for response in pair.responses] == [-index, -10 - index]
        assert [response.reference_shared_logp for response in pair.responses] == [None, None]
    data.attach_reference(np.concatenate([values, -values], axis=1))
    assert data[3].responses[0].reference_logp == -3
    assert [response.reference_shared_logp for response in data[3].responses] == [3, 13]
    with pytest.raises(DataError, match=r"\(12, 2\) for 8 pairs"):
        load(data_config(path), tiny).attach_reference(values)
    values[2, 1] = np.nan
    with pytest.raises(DataError, match="pair 'p2' is not finite"):
        data.attach_reference(values)


def test_wrong_settings(
    data_config: Callable[..., DataConfig], tiny: PreTrainedTokenizerBase, write_jsonl: Callable[..., str]
) -> None:
    path = write_jsonl(GOOD)
    for changes, message in (
        ({"max_prompt_length": 64}, r"data.max_length=64 leaves no room"),
        ({"chat_template": "chatlm"}, r"data.chat_template=chatlm .*did you mean 'chatml'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(data_config(path, **changes), tiny)
    with pytest.raises(ConfigError, match=r"data.validation.path is not set"):
        load_preference_dataset(DataConfig(), DatasetConfig(), tiny, name="validation")
    with pytest.raises(DataError, match=r"nothing.jsonl does not exist"):
        load(data_config("nothing.jsonl"), tiny)


def test_without_a_home_directory(
    data_config: Callable[..., DataConfig],
    tiny: PreTrainedTokenizerBase,
    write_jsonl: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def no_home() -> Never:
        raise RuntimeError("Could not determine home directory.")

    path = write_jsonl(GOOD)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ConfigError, match=r"no home directory .*set data\.cache_dir"):
        load(data_config(path, cache_dir=None), tiny)
    load(data_config(path), tiny)
    monkeypatch.setattr(Path, "expanduser", lambda path: no_home())
    with pytest.raises(ConfigError, match=r"data\.cache_dir='~/x': there is no such home"):
        cache_root("~/x")
    with pytest.raises(DataError, match="cannot be looked for"):
        load(data_config("~/pairs.jsonl"), tiny)


def test_default_cache_directory(
    tiny: PreTrainedTokenizerBase, write_jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    config = DataConfig(train=DatasetConfig(path=write_jsonl(GOOD)))
    load(config, tiny)
    assert list((tmp_path / "xdg" / "nemo_lmpo" / "pairs").glob("*/pairs.arrow"))


def test_real_pairs(
    data_config: Callable[..., DataConfig],
    smollm2: PreTrainedTokenizerBase,
    real_pairs: list[dict[str, Any]],
    shared_dir: Path,
) -> None:
    path = str(shared_dir / "data" / "alpaca_pairs_train.jsonl.gz")
    data = load(data_config(path, max_length=384, max_prompt_length=128), smollm2)
    assert len(data) == len(real_pairs)
    lengths = np.asarray(data.lengths)
    whole = np.asarray(load(data_config(path, max_length=10_000, max_prompt_length=5000), smollm2).lengths)
    over = whole[:, 0] + whole[:, 1:].max(axis=1) > 384
    prompts = np.where(over, np.minimum(whole[:, 0], 128), whole[:, 0])
    assert lengths[:, 0].tolist() == prompts.tolist()
    assert lengths[:, 1:].tolist() == np.minimum(whole[:, 1:], 384 - prompts[:, None]).tolist()
    assert data.summary.prompts_cut == (prompts < whole[:, 0]).sum() > 0
    assert data.summary.responses_cut == (lengths[:, 1:] < whole[:, 1:]).any(axis=1).sum() > 0
    cut = data.summary.responses_cut
    assert (
        f"  warning: {cut / len(data):.0%} of the pairs ({cut} of {len(data)}) lose the end of a response; "
        f"raise data.max_length=384"
    ) in str(data.summary).splitlines()
    uncut = next(i for i in range(len(data)) if lengths[i].sum() < 384)
    pair, row = data[uncut], real_pairs[uncut]
    assert smollm2.decode(pair.responses[0].ids) == row["chosen"][-1]["content"] + "<|im_end|>"
    assert pair.example_id == row["prompt_id"]


@pytest.mark.parametrize(("cut", "warnings"), [(0, 0), (5, 0), (6, 1), (100, 1)])
def test_more_than_outliers_cut_is_a_warning(cut: int, warnings: int) -> None:
    summary = DataSummary("train", 100, [SourceSummary("pairs.jsonl", 120, 100, 100)], responses_cut=cut, max_length=64)
    lines = str(summary).splitlines()
    assert sum("warning: " in line for line in lines) == warnings
    assert sum(f"cut to length: 0 prompts, responses of {cut} pairs" in line for line in lines) == (cut > 0)
    if warnings:
        warning = f"  warning: {cut}% of the pairs ({cut} of 100) lose the end of a response; raise data.max_length=64"
        assert warning in lines
    prompts = str(DataSummary("train", 100, summary.sources, prompts_cut=10, max_length=64))
    assert "warning: 10% of the pairs (10 of 100) lose the prompt's beginning; raise data.max_length=64" in prompts


def test_the_environment_is_left_alone(data_config: Callable[..., DataConfig], tiny: PreTrainedTokenizerBase) -> None:
    before = dict(os.environ)
    load(data_config("builtin:tiny", limit=300), tiny)
    assert dict(os.environ) == before
