"""Tokenizer directories, each changed in one field or file: read as transformers does, or refused in a sentence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nemo_lmpo.data.tokenizer import load_tokenizer
from nemo_lmpo.errors import UserError
from tests.fuzz.against_transformers import quiet
from tests.unit.data import token_directories as made

TEXTS = tuple(made.texts(spaces=False))
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 3, -1, 2.5, "", "x", made.START, "<s>", [], [made.START], [5], {}, {"content": made.TOOL}),
    *({"a": made.START}, {"content": 5}, {"__type": "AddedToken", "content": made.END, "special": True}, 10**30),
)
SETTINGS = (
    *("add_bos_token", "add_eos_token", "add_prefix_space", "additional_special_tokens", "added_tokens_decoder"),
    *("bos_token", "chat_template", "clean_up_tokenization_spaces", "cls_token", "eos_token", "extra_special_tokens"),
    *("legacy", "model_max_length", "pad_token", "padding_side", "sp_model_kwargs", "spaces_between_special_tokens"),
    *("split_special_tokens", "tokenizer_class", "truncation_side", "unk_token", "use_default_system_prompt", "vocab"),
)
OTHERS = {
    "special_tokens_map.json": ("bos_token", "eos_token", "pad_token", "additional_special_tokens", "unk_token"),
    "added_tokens.json": (made.START, "the", "<s>", ""),
}
TEXT = (b"", b"[]", b"null", b"{", b"5", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}")
_DECODER = {
    **{str(i): {"content": name, "special": True} for i, name in enumerate(("<unk>", "<s>", "</s>"))},
    "400": {"content": made.END, "special": True},
}


LENIENT = {
    "(model_max_length|padding_side|truncation_side|sp_model_kwargs)=": "not read here: it decides no ids",
    "added_tokens_decoder=null|normalized=|(special|lstrip|rstrip|single_word)=null": "what is not said is false",
    "(bos|eos|pad|cls|sep|mask|unk)_token={": "the content of a token, with or without its type",
    "split_special_tokens=null": "what is not said is false",
}
"""What is read from a SentencePiece directory though transformers 5 does not load it, and why."""
OTHERWISE = {
    "legacy=null": "version 4 takes null for true, 5 for false",
    "special_tokens_map.json: additional_special_tokens=": "version 4 adds these tokens, 5 leaves them out",
}
"""Where transformers 4 and 5 make different ids; those of 4 are compared in tests/system."""


@dataclass(frozen=True)
class Change:
    """A change of a directory that holds a `tokenizer.json` (``fast``) or a SentencePiece model only."""

    name: str
    fast: bool
    make: Callable[[Path], None]

    def __str__(self) -> str:
        return f"{'tokenizer.json' if self.fast else 'tokenizer.model'}: {self.name}"


def _edit(name: str, field: str, value: Any) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        path = directory / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, field: value}))

    return make


def changes() -> Iterator[Change]:
    """All of them."""
    for fast in (False, True):
        for name, fields in (("tokenizer_config.json", SETTINGS), *OTHERS.items()):
            for field in fields:
                for value in VALUES:
                    yield Change(f"{name}: {field}={json.dumps(value)[:40]}", fast, _edit(name, field, value))
        for name in ("tokenizer_config.json", *OTHERS, *(("tokenizer.json",) if fast else ("tokenizer.model",))):
            for number, text in enumerate(TEXT):
                yield Change(f"{name} is text {number}", fast, partial(_write, name=name, text=text))
        for field in ("content", "special", "lstrip", "rstrip", "single_word", "normalized"):
            for value in VALUES:
                decoder = {**_DECODER, "401": {"content": made.START, field: value}}
                make = _edit("tokenizer_config.json", "added_tokens_decoder", decoder)
                yield Change(f"added_tokens_decoder: {field}={json.dumps(value)[:40]}", fast, make)


def _write(directory: Path, name: str, text: bytes) -> None:
    (directory / name).write_bytes(text)


class Judge:
    """Compares on changed copies of two directories below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        model = made.train_pieces(root)
        settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
        self.slow = made.write(root / "slow", model, {"tokenizer_config.json": settings})
        self.fast = root / "fast"
        load_tokenizer(str(self.slow)).save_pretrained(self.fast)

    def copy(self, change: Change) -> Path:
        """The changed directory."""
        directory = self.root / "changed"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(self.fast if change.fast else self.slow, directory)
        change.make(directory)
        return directory

    def __call__(self, change: Change) -> str | None:
        """What is wrong; None: nothing."""
        directory = self.copy(change)
        with quiet():
            try:
                ours = load_tokenizer(str(directory))
                found = [ours(text)["input_ids"] for text in TEXTS]
            except UserError as error:
                return f"refused with: {error}" if "\n" in str(error) or len(str(error)) > 800 else None
            except Exception as error:  # a traceback is the finding
                return f"a traceback: {type(error).__name__}: {str(error)[:150]}"
            expected = _theirs(directory, change.fast)
        if isinstance(expected, str):
            return None if _among(LENIENT, change) else f"loaded, but transformers refuses it ({expected})"
        if _among(OTHERWISE, change) and not change.fast:
            return None
        wrong = [text for text, one, other in zip(TEXTS, found, expected, strict=True) if one != other]
        return f"other ids: {wrong[0]!r}" if wrong else None


def _among(table: dict[str, str], change: Change) -> bool:
    return any(re.search(pattern, str(change)) for pattern in table)


def _theirs(directory: Path, fast: bool) -> list[list[int]] | str:
    from transformers import AutoTokenizer, LlamaTokenizer

    try:
        tokenizer = (AutoTokenizer if fast else LlamaTokenizer).from_pretrained(directory)
        return [tokenizer(text)["input_ids"] for text in TEXTS]
    except Exception as error:  # whatever it raises, it does not load it
        return f"{type(error).__name__}: {str(error)[:200]}"
