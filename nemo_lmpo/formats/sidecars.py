"""The files of a Hugging Face model besides its weights, and what can be made of a bare SentencePiece model."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.formats.architecture import parse_json
from nemo_lmpo.formats.archive import own_file
from nemo_lmpo.formats.fields import Fields
from nemo_lmpo.formats.token_files import TOKEN_FILES, TokenFiles, read_token_files

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

SideFile = Callable[[], bytes]
"""Reads a file."""

_SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model*",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Copied unchanged. Python files are not: nothing here may need `trust_remote_code`."""

TOKENIZER_PATTERNS = (*_SIDE_FILES, "additional_chat_templates/*.jinja")
"""What is fetched from a hub besides weights."""


def is_sidecar(name: str) -> bool:
    """Whether a file of a model directory, named from there, goes with the model."""
    # A `*` also matches slashes, which would take files of any folder.
    return any(
        fnmatch.fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in TOKENIZER_PATTERNS
    )


def sidecar_names(directory: Path) -> list[str]:
    """Side files of a model directory, named from there.

    Raises:
        CheckpointError: one is a link out of the directory.
    """
    found = (path for path in (*directory.glob("*"), *directory.glob("*/*")) if path.is_file())
    names = sorted(name for name in (path.relative_to(directory).as_posix() for path in found) if is_sidecar(name))
    for name in names:
        own_file(directory, name)
    return names


def side_files(directory: Path) -> dict[str, SideFile]:
    """The side files of a model directory by name; none if there is no such directory."""
    return {name: (directory / name).read_bytes for name in sidecar_names(directory)}


def sentencepiece_files(content: bytes, origin: str) -> dict[str, SideFile]:
    """Tokenizer files of a model that has a SentencePiece model only, as Llama 2 and Mistral have them.

    Raises:
        CheckpointError: it is no such model.
    """
    processor = sentencepiece_model(content)
    if processor is None:
        raise CheckpointError(f"{origin} is not a SentencePiece model; give the tokenizer with --tokenizer DIR")
    ids = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
    tokens = {name: processor.id_to_piece(number) for name, number in ids.items() if number >= 0}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, **tokens}
    settings = (json.dumps(config, indent=2) + "\n").encode()
    return {"tokenizer.model": lambda: content, "tokenizer_config.json": lambda: settings}


def sentencepiece_model(content: bytes | None) -> SentencePieceProcessor | None:
    """The processor of a `tokenizer.model`; None if that is absent, or one of the other formats of this name."""
    from sentencepiece import SentencePieceProcessor

    if content is None:
        return None
    try:
        processor = SentencePieceProcessor(model_proto=content)
    except RuntimeError:
        return None
    return processor if processor.get_piece_size() else None


def special_token_ids(files: Mapping[str, bytes], origin: str) -> dict[str, Any]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id`: of the generation config, else of the tokenizer.

    Raises:
        CheckpointError: one of the files is damaged.
    """
    generation = _fields(files, "generation_config.json", origin)
    named = {f"{kind}_token_id": generation.get(f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    if any(number is not None for number in named.values()):
        return {name: number for name, number in named.items() if number is not None}
    if "tokenizer.json" in files:
        settings, tokenizer = _fields(files, "tokenizer_config.json", origin), fast_tokenizer(files, origin)
        found = {}
        for kind in ("bos", "eos", "pad"):
            token = settings.get(f"{kind}_token")
            token = token.get("content") if isinstance(token, dict) else token
            number = tokenizer.token_to_id(token) if isinstance(token, str) else None
            if number is not None:
                found[f"{kind}_token_id"] = int(number)
        return found
    sentencepiece = _sentencepiece_tokens(files, origin)
    if sentencepiece is None:
        return {}
    pieces, tokens = sentencepiece
    ids = {f"{kind}_token_id": tokens.token_id(f"{kind}_token", pieces) for kind in ("bos", "eos", "pad")}
    return {name: number for name, number in ids.items() if number is not None}


def _fields(files: Mapping[str, bytes], name: str, origin: str) -> Mapping[str, Any]:
    return Fields(parse_json(files.get(name, b"{}"), f"{origin}: {name}"), f"{origin}: {name}").values


def fast_tokenizer(files: Mapping[str, bytes], origin: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`.

    Raises:
        CheckpointError: it is damaged.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(files["tokenizer.json"].decode())
    except Exception as error:  # the tokenizers library raises bare Exceptions
        reason = str(error).split("\n")[0][:200]
        raise CheckpointError(f"{origin}: tokenizer.json cannot be read ({reason}); restore the file") from None


def pruned_vocabulary(sidecars: Mapping[str, SideFile], rows: int, multiple: int, origin: str) -> int:
    """Vocabulary size behind ``rows`` stored rows that may be padded to a ``multiple``.

    It is the tokenizer's size if padding that gives exactly these rows; else all rows are the vocabulary, since
    models may have more rows than their tokenizer has tokens.

    Raises:
        CheckpointError: the tokenizer's files are damaged.
    """
    names = [name for name in ("tokenizer.json", "tokenizer.model", *TOKEN_FILES) if name in sidecars]
    size = _tokenizer_size({name: sidecars[name]() for name in names}, origin)
    if size is None or not 0 < size < rows:
        return rows
    return size if math.ceil(size / multiple) * multiple == rows else rows


def _tokenizer_size(files: Mapping[str, bytes], origin: str) -> int | None:
    if "tokenizer.json" in files:
        return int(fast_tokenizer(files, origin).get_vocab_size(with_added_tokens=True))
    found = _sentencepiece_tokens(files, origin)
    return None if found is None else max([len(found[0]), *(number + 1 for number in found[1].added)])


def _sentencepiece_tokens(files: Mapping[str, bytes], origin: str) -> tuple[list[str], TokenFiles] | None:
    """The tokens of a SentencePiece model by id, and those that the files beside it name; None if there is no model."""
    processor = sentencepiece_model(files.get("tokenizer.model"))
    if processor is None:
        return None
    pieces = [processor.id_to_piece(number) for number in range(processor.get_piece_size())]
    ids = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
    usual = {duty: pieces[number] for duty, number in ids.items() if number >= 0}
    return pieces, read_token_files(files, pieces, usual, origin)


def tokens_beyond_sentencepiece(files: Mapping[str, bytes], origin: str) -> list[str]:
    """The tokens of a model's tokenizer that its `tokenizer.model` does not have, or has under another id.

    Raises:
        CheckpointError: the tokenizer's files are damaged.
    """
    found = _sentencepiece_tokens(files, origin)
    if found is None:
        return []
    pieces = found[0]
    if "tokenizer.json" in files:
        tokens = {int(number): str(text) for text, number in fast_tokenizer(files, origin).get_vocab().items()}
    else:
        tokens = {number: token.content for number, token in found[1].added.items()}
    return [text for number, text in sorted(tokens.items()) if number >= len(pieces) or pieces[number] != text]
