"""Directories of a small SentencePiece model with other files beside it, and texts made of every added token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

START, END, TOOL, PAD = "<|im_start|>", "<|im_end|>", "<tool>", "[PAD]"
_WORDS = "the quick brown fox jumps over a lazy dog while 12 people sing; it's 3.5 degrees, isn't it?"


def train_pieces(directory: Path) -> Path:
    """A `tokenizer.model` as Llama's: BPE, bytes for unknown letters, runs of spaces as pieces of their own."""
    text = directory / "text"
    text.write_text("\n".join(f"{_WORDS} {number} {_WORDS[number % 40 :]}" for number in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(directory / "tokenizer"), model_type="bpe", vocab_size=400, minloglevel=2,
        byte_fallback=True, split_digits=True, remove_extra_whitespaces=False, normalization_rule_name="identity",
    )  # fmt: skip
    return directory / "tokenizer.model"


def _token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, **flags}


def _decoder(*tokens: dict[str, Any]) -> dict[str, Any]:
    special = [_token(name, special=True) for name in ("<unk>", "<s>", "</s>")]
    numbered = {**dict(enumerate(special)), **{400 + index: token for index, token in enumerate(tokens)}}
    return {str(number): token for number, token in numbered.items()}


_CHAT = _decoder(_token(END, special=True), _token(START, special=True), _token(TOOL))
_BASE = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
DIRECTORIES: dict[str, dict[str, dict[str, Any]]] = {
    "nothing": {},
    "plain": {"tokenizer_config.json": _BASE},
    "chat tokens, no BOS": {
        "tokenizer_config.json": {
            **_BASE, "add_bos_token": False, "eos_token": END, "bos_token": "<s>", "added_tokens_decoder": _CHAT,
            "additional_special_tokens": [START, END],
        },
    },
    "EOS at the end": {"tokenizer_config.json": {**_BASE, "add_eos_token": True}},
    "EOS alone": {"tokenizer_config.json": {**_BASE, "add_eos_token": True, "add_bos_token": False}},
    "added_tokens.json": {
        "tokenizer_config.json": {**_BASE, "eos_token": END},
        "added_tokens.json": {END: 400, START: 401, TOOL: 402},
        "special_tokens_map.json": {"eos_token": _token(END), "additional_special_tokens": [START]},
    },
    "special tokens without ids": {
        "tokenizer_config.json": _BASE,
        "special_tokens_map.json": {"additional_special_tokens": [START, END], "pad_token": PAD},
    },
    "the decoder counts": {
        "tokenizer_config.json": {**_BASE, "added_tokens_decoder": _decoder(_token(TOOL))},
        "added_tokens.json": {START: 400},
        "special_tokens_map.json": {"eos_token": END},
    },
    "padding": {"tokenizer_config.json": {**_BASE, "pad_token": PAD}},
    "ids with a gap": {
        "tokenizer_config.json": {**_BASE, "added_tokens_decoder": {"410": _token(TOOL), "405": _token(END)}},
    },
    "tokens that take spaces": {
        "tokenizer_config.json": {
            **_BASE,
            "added_tokens_decoder": _decoder(_token(START, lstrip=True), _token(END, rstrip=True, special=True),
                                             _token("word", single_word=True)),
        },
    },
    "no space behind tokens": {
        "tokenizer_config.json": {**_BASE, "legacy": False, "added_tokens_decoder": _CHAT},
    },
}  # fmt: skip
"""Files beside `tokenizer.model`; `nothing` leaves everything to its reader."""


def write(directory: Path, model: Path, files: dict[str, dict[str, Any]]) -> Path:
    """A directory with the model and the files."""
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(model.read_bytes())
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return directory


def texts(*, spaces: bool = True) -> Iterator[str]:
    """With every token in it, and with ``spaces`` in runs and in front, too."""
    yield from ("the quick fox", "caf\u00e9 \u65e5", "12 people sing; it's 3.5", "a\nb")
    for token in (START, END, TOOL, PAD, "word", "<s>", "</s>", "<unk>"):
        yield from (token, f"the{token}fox", f"{token}the fox{token}", f"{token}{token}", f"fox{token}\n")
        if spaces:
            yield from (f"the {token} fox", f" {token}  the", f"the   fox {token}{token}  a ", f"  a{token}")
    if spaces:
        yield from ("  a", " a", "a     b", "   ", "the  quick   fox    jumps ")
