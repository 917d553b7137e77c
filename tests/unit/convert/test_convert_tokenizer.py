"""Tokens that a SentencePiece model lacks are not lost on the way to NeMo."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from nemo_lmpo.convert.command import hf_to_nemo
from nemo_lmpo.data.tokenizer import load_tokenizer
from nemo_lmpo.formats.sidecars import pruned_vocabulary, side_files, special_token_ids
from tests.unit.data import token_directories as made
from tests.unit.formats import tiny_models as tiny

CHAT = made.DIRECTORIES["chat tokens, no BOS"]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.train_pieces(tmp_path_factory.mktemp("pieces"))


def _model(directory: Path, pieces: Path, files: dict[str, dict[str, object]], *, fast: bool) -> Path:
    tiny.save("llama2", directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (directory / name).unlink(missing_ok=True)
    shutil.copy(pieces, directory / "tokenizer.model")
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    if fast:
        load_tokenizer(str(directory)).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(("name", "library"), [("plain", "sentencepiece"), ("chat tokens, no BOS", "huggingface")])
def test_section(
    name: str, library: str, fast: bool, pieces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _model(tmp_path / "hf", pieces, made.DIRECTORIES[name], fast=fast)
    assert hf_to_nemo(["--input", str(source), "--output", str(tmp_path / "nemo"), "--quiet"]) == 0
    section = yaml.safe_load((tmp_path / "nemo" / "model_config.yaml").read_text())["tokenizer"]
    assert section["library"] == library
    told = capsys.readouterr().out
    if library == "huggingface":
        assert section["type"] == str(source)
        assert "tokenizer.model lacks 3 tokens of the tokenizer ('<|im_end|>', '<|im_start|>', '<tool>')" in told
    else:
        assert "lacks" not in told


def test_ids_and_size_of_a_sentencepiece_directory(pieces: Path, tmp_path: Path) -> None:
    directory = made.write(tmp_path / "d", pieces, CHAT)
    files = {name: read() for name, read in side_files(directory).items()}
    assert special_token_ids(files, "d") == {"bos_token_id": 1, "eos_token_id": 400}
    # 403 tokens, padded to a multiple of 8: these rows are the vocabulary, and five are padding.
    assert pruned_vocabulary(side_files(directory), 408, 8, "d") == 403
