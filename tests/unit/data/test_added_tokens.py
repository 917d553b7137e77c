"""Tokens beside a SentencePiece model, against the installed transformers where it reads such directories rightly.

It ranks runs of spaces otherwise than SentencePiece does, so texts have none; tests/system compares those, too.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_lmpo.data.tokenizer import load_tokenizer
from nemo_lmpo.errors import ConfigError
from tests.unit.data.token_directories import DIRECTORIES, END, START, texts, train_pieces, write


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_pieces(tmp_path_factory.mktemp("pieces"))


OTHERWISE = ("nothing", "ids with a gap", "special tokens without ids")
"""Here transformers 5 does otherwise than 4: no BOS, other ids, tokens left out."""


@pytest.mark.parametrize("name", [name for name in DIRECTORIES if name not in OTHERWISE])
def test_ids(name: str, model: Path, tmp_path: Path) -> None:
    from transformers import LlamaTokenizer

    directory = write(tmp_path / "d", model, DIRECTORIES[name])
    ours, theirs = load_tokenizer(str(directory)), LlamaTokenizer.from_pretrained(directory)
    for text in texts(spaces=False):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    ours.save_pretrained(tmp_path / "again")
    again = load_tokenizer(str(tmp_path / "again"))
    for text in texts():
        assert again(text)["input_ids"] == ours(text)["input_ids"], text


def test_the_case_that_was_ignored(model: Path, tmp_path: Path) -> None:
    files = DIRECTORIES["chat tokens, no BOS"]
    tokenizer = load_tokenizer(str(write(tmp_path / "d", model, files)))
    assert tokenizer(f"{START}{END}")["input_ids"] == [401, 400]
    assert tokenizer.eos_token_id == 400


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "{", "is not valid JSON"),
        ("tokenizer_config.json", "[]", "instead of named fields"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', "'x' is not the id of a token"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": {}}}', "this is {}, which is not a token"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": "a"}}', "instead of named fields"),
        ("tokenizer_config.json", '{"eos_token": 5}', "eos_token is 5, which is not a token"),
        ("tokenizer_config.json", '{"add_bos_token": "no"}', "add_bos_token='no' is neither true nor false"),
        ("special_tokens_map.json", '{"additional_special_tokens": "a"}', "is not a list of tokens"),
        ("added_tokens.json", '{"a": 1.5}', "1.5 is not the id of a token"),
        ("added_tokens.json", '{"<new>": 300}', "'<new>' has the id 300, which belongs to"),
        ("added_tokens.json", '{"<s>": 400}', "'<s>' has the id 400, but is 1 in tokenizer.model"),
        ("added_tokens.json", '{"": 400}', "a token is '', which is not a token"),
        ("tokenizer_config.json", '{"split_special_tokens": true}', "split_special_tokens=True is not supported"),
        ("tokenizer_config.json", '{"unk_token": "x"}', "unk_token='x' is not the model's own; set it to <unk>"),
    ],
)
def test_damaged_files(name: str, content: str, message: str, model: Path, tmp_path: Path) -> None:
    directory = write(tmp_path / "d", model, {})
    (directory / name).write_text(content)
    with pytest.raises(ConfigError, match=message) as told:
        load_tokenizer(str(directory))
    assert "\n" not in str(told.value)
