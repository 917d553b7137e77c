"""Tokens beside a SentencePiece model: the ids are those of the slow tokenizer of transformers 4, which calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.data.tokenizer import load_tokenizer
from tests.system import read_tokenizer
from tests.system.test_older_transformers import older  # noqa: F401 - a fixture
from tests.unit.data import token_directories as made

TEXTS = list(made.texts())
OTHERWISE = {
    "added_tokens.json": "</s>",  # the end of a text only for the fast tokenizer, as it is no longer EOS
    "tokens that take spaces": "word",  # cuts the text even where it is not a word of its own
    "no space behind tokens": "",  # its fast tokenizer, and transformers 5, do not double a space in front
}
"""Texts with this are other ids for the slow tokenizer than for the fast ones of transformers 4 and 5."""


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    model = made.train_pieces(root)
    return {name: made.write(root / str(i), model, files) for i, (name, files) in enumerate(made.DIRECTORIES.items())}


@pytest.fixture(scope="module")
def theirs(older: Path, directories: dict[str, Path]) -> dict[str, Any]:  # noqa: F811
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(older), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, read_tokenizer.__file__, *map(str, directories.values())]
    ended = subprocess.run(
        command, env=environment, input=json.dumps(TEXTS), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    return {name: found[str(directory)] for name, directory in directories.items()}


@pytest.mark.parametrize("name", made.DIRECTORIES)
def test_ids(name: str, directories: dict[str, Path], theirs: dict[str, Any]) -> None:
    tokenizer, expected = load_tokenizer(str(directories[name])), theirs[name]
    assert "refused" not in expected, expected
    for text, ids, bare in zip(TEXTS, expected["ids"], expected["bare"], strict=True):
        if name in OTHERWISE and OTHERWISE[name] in text:
            continue
        assert tokenizer(text)["input_ids"] == ids, text
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == bare, text
    assert {kind: getattr(tokenizer, f"{kind}_id") for kind in expected["special"]} == expected["special"]
    assert len(tokenizer) == expected["size"]
