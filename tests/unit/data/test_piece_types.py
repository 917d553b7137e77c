"""Pieces of a SentencePiece model that are not found by merging: read as SentencePiece does, or refused."""

from __future__ import annotations

import importlib
import json
import random
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from nemo_lmpo.data.tokenizer import load_tokenizer
from nemo_lmpo.errors import ConfigError
from tests.unit.data import token_directories as made
from tests.unit.data.pair_rows import package_file

pb2 = importlib.import_module("sentencepiece.sentencepiece_model_pb2")  # has no types


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.train_pieces(tmp_path_factory.mktemp("pieces"))


def _changed(model: Path, directory: Path, name: str) -> tuple[SentencePieceProcessor, str]:
    """A directory whose model has its longest piece of another type, as SentencePiece reads it, and the piece."""
    proto = pb2.ModelProto.FromString(model.read_bytes())
    piece = max(proto.pieces, key=lambda one: len(one.piece))
    piece.type = getattr(pb2.ModelProto.SentencePiece, name)
    (directory / "tokenizer.model").write_bytes(proto.SerializeToString())
    return SentencePieceProcessor(model_file=str(directory / "tokenizer.model")), str(piece.piece)


def test_pieces_that_are_never_given_are_refused(model: Path, tmp_path: Path) -> None:
    other, piece = _changed(model, tmp_path, "UNUSED")
    text = f"a{piece}b".replace("\u2581", " ")
    assert load_tokenizer(str(model.parent))(text, add_special_tokens=False)["input_ids"] != other.Encode(text)
    with pytest.raises(ConfigError, match=r"pieces that it never gives, such as .*tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def _mixed(symbols: list[str]) -> list[str]:
    draw = random.Random(0)
    parts = [*symbols, "hi", " ", "  ", "x\n", "[", "REF", "\u00e9\u65e5", "quick"]
    texts = ("".join(draw.choice(parts) for _ in range(draw.randint(1, 8))) for _ in range(2000))
    # The one exception: a text that is a symbol and nothing else, which is as transformers' fast tokenizers have it.
    return [text for text in texts if text not in symbols]


def test_symbols_of_a_model_are_found_as_sentencepiece_finds_them(tmp_path: Path) -> None:
    path = package_file("mistral_common", "data", "mistral_instruct_tokenizer_240323.model.v3")
    (tmp_path / "tokenizer.model").write_bytes(path.read_bytes())
    pieces = SentencePieceProcessor(model_file=str(path))
    proto = pb2.ModelProto.FromString(path.read_bytes())
    kind = pb2.ModelProto.SentencePiece.USER_DEFINED
    symbols = [piece.piece for piece in proto.pieces if piece.type == kind]
    assert len(symbols) == 20
    tokenizer = load_tokenizer(str(tmp_path))
    for text in _mixed(symbols):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.Encode(text), text
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in symbols:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == theirs(text, add_special_tokens=False)["input_ids"] == [pieces.PieceToId(text)], text


@pytest.mark.parametrize("settings", [{"add_prefix_space": False}, {"legacy": False}])
def test_symbols_with_other_settings(settings: dict[str, bool], model: Path, tmp_path: Path) -> None:
    _, piece = _changed(model, tmp_path, "USER_DEFINED")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **settings}))
    if "legacy" in settings:
        with pytest.raises(ConfigError, match=r"symbols of its own, such as .*tokenizer\.json"):
            load_tokenizer(str(tmp_path))
    else:
        text = f"a{piece}b".replace("\u2581", " ")
        assert piece in load_tokenizer(str(tmp_path)).tokenize(text)


def test_a_hubs_sentencepiece_model_is_read_as_a_directorys(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("nemo_lmpo.data.hub._host_is_known", lambda endpoint: False)
    root = tmp_path / "hub" / "models--owner--pieces"
    snapshot = root / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("1" * 40)
    shutil.copy(model, snapshot / "tokenizer.model")
    (snapshot / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    expected = SentencePieceProcessor(model_file=str(model))
    tokenizer = load_tokenizer("owner/pieces")
    for text in ("the  quick   brown", "a\n\n b", "x     y\tz"):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected.Encode(text)
