"""Exports that were changed since they were written: every later stage names the file."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.formats.conversion import holds, plan, renew_side_files, write_huggingface
from nemo_lmpo.formats.export_record import RECORD, changed_weights, check_weights, write_record
from nemo_lmpo.formats.model_files import open_model
from tests.unit.formats import tiny_models as tiny


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exports")
    tiny.save("llama2", root / "start")
    for name, content in (("tokenizer_config.json", "{}"), ("chat_template.jinja", "{{ messages }}"), ("LICENSE", "x")):
        (root / "start" / name).write_text(content)
    (root / "start/generation_config.json").write_text('{"eos_token_id": 2}')
    write_huggingface(plan(open_model(root / "start"), root / "export"), max_shard_bytes=20_000)
    return root / "export"


@pytest.fixture
def export(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "export"))


def _shard(export: Path) -> Path:
    return sorted(export.glob("*.safetensors"))[1]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


SMALL: dict[str, Callable[[Path], object]] = {
    "chat_template.jinja": lambda export: (export / "chat_template.jinja").write_text("{{ messages[0] }}"),
    "tokenizer_config.json": lambda export: (export / "tokenizer_config.json").write_text("[]"),
    "config.json": lambda export: (export / "config.json").write_text(
        (export / "config.json").read_text().replace("10000.0", "20000.0")
    ),
    "model.safetensors.index.json": lambda export: _flip(export / "model.safetensors.index.json"),
    "tokenizer.json": lambda export: (export / "tokenizer.json").write_text("{}"),  # came
    "model.safetensors": lambda export: shutil.copy(_shard(export), export / "model.safetensors"),  # came
}


def test_an_export_is_as_it_was_written(export: Path) -> None:
    assert len(list(export.glob("*.safetensors"))) > 1
    open_model(export)
    check_weights(export)
    record = json.loads((export / RECORD).read_text())
    assert set(record["files"]) == {path.name for path in export.iterdir()} - {RECORD, "LICENSE"}


@pytest.mark.parametrize("name", SMALL)
def test_a_changed_small_file_is_refused_when_the_export_is_opened(name: str, export: Path) -> None:
    before = (export / name).read_bytes() if (export / name).exists() else None
    SMALL[name](export)
    assert (export / name).read_bytes() != before
    with pytest.raises(CheckpointError, match=f"export: {name} is not what was written there") as raised:
        open_model(export)
    assert f"remove {export / RECORD}" in str(raised.value)
    if name in ("chat_template.jinja", "config.json"):
        (export / RECORD).unlink()  # the one-line way of who means it
        open_model(export)


def test_weights_of_the_same_size_are_told_by_their_content(export: Path) -> None:
    shard = _shard(export)
    _flip(shard)
    open_model(export)  # sizes only: shards are large
    with pytest.raises(CheckpointError, match=f"{shard.name} is not what was written there: it has other content"):
        check_weights(export)
    # Processes share the files: one of them sees it.
    assert sum(changed_weights(export, (rank, 3)) is not None for rank in range(3)) == 1


def test_truncated_and_lost_shards_are_named(export: Path) -> None:
    shard = _shard(export)
    content = shard.read_bytes()
    shard.write_bytes(content[:-4])
    with pytest.raises(CheckpointError, match=shard.name):
        open_model(export)
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        open_model(export)


def test_settings_of_generation_may_be_set(export: Path, caplog: pytest.LogCaptureFixture) -> None:
    (export / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.7}')
    (export / "README.md").write_text("# Mine")
    (export / "LICENSE").write_text("mine")
    with caplog.at_level(logging.WARNING):
        open_model(export)
    assert [record.getMessage() for record in caplog.records] == [
        f"{export}: generation_config.json is not what was written there: it has 39 bytes instead of 19; "
        "it is used as it is"
    ]


def test_the_same_command_again_mends_it_and_says_so(
    exported: Path, export: Path, caplog: pytest.LogCaptureFixture
) -> None:
    conversion = plan(open_model(exported), export)
    (export / "chat_template.jinja").write_text("{{ 1 }}")
    (export / "generation_config.json").write_text('{"temperature": 0.5}')  # users may set it, and it is told when lost
    assert holds(conversion)
    renew_side_files(conversion)
    said = "was edited, or written by another version; it is replaced by what the model gives"
    assert [record.getMessage() for record in caplog.records] == [
        f"{export}: {name} {said}" for name in ("generation_config.json", "chat_template.jinja")
    ]
    caplog.clear()
    renew_side_files(conversion)
    assert not caplog.records
    open_model(export)
    names = [path.name for path in exported.iterdir()]
    assert all((export / name).read_bytes() == (exported / name).read_bytes() for name in names)


def test_a_file_that_was_added_does_not_become_one_of_the_export(exported: Path, export: Path) -> None:
    (export / "added_tokens.json").write_text("{}")
    (export / "chat_template.jinja").write_text("{{ 1 }}")
    with pytest.raises(CheckpointError, match=r"added_tokens.json is not what was written there: it was added"):
        renew_side_files(plan(open_model(exported), export))
    assert (export / "chat_template.jinja").read_text() == "{{ 1 }}"


def test_a_file_that_only_an_earlier_version_wrote_goes(exported: Path, export: Path) -> None:
    (export / "added_tokens.json").write_text("{}")
    write_record(export)
    renew_side_files(plan(open_model(exported), export))
    assert not (export / "added_tokens.json").exists()
    open_model(export)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 1}', '{"version": 9, "algorithm": "x", "files": {}}'])
def test_a_damaged_record_is_refused_and_can_be_removed(content: str, export: Path) -> None:
    (export / RECORD).write_text(content)
    with pytest.raises(CheckpointError, match="remove this file"):
        open_model(export)
    (export / RECORD).unlink()
    open_model(export)
