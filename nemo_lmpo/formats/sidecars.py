"""The files of a Hugging Face model besides its weights, and what can be made of a bare SentencePiece model."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Mapping
from pathlib import Path

from nemo_lmpo.formats.archive import FileReference

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
    """Side files of a model directory, named from there."""
    found = (path for path in (*directory.iterdir(), *directory.glob("*/*")) if path.is_file())
    names = (path.relative_to(directory).as_posix() for path in found)
    return sorted(name for name in names if is_sidecar(name))


def sentencepiece_files(model: FileReference) -> dict[str, FileReference | bytes]:
    """Tokenizer files of a model that has a SentencePiece model only, as Llama 2 and Mistral have them."""
    tokens = _special_tokens(model.read())
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, **tokens}
    return {"tokenizer.model": model, "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode()}


def _special_tokens(content: bytes) -> dict[str, str]:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=content)
    ids = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
    return {name: processor.id_to_piece(number) for name, number in ids.items() if number >= 0}


def pruned_vocabulary(sidecars: Mapping[str, FileReference | bytes], rows: int, multiple: int) -> int:
    """Vocabulary size behind ``rows`` stored rows that may be padded to a ``multiple``.

    It is the tokenizer's size if padding that gives exactly these rows; else all rows are the vocabulary, since
    models may have more rows than their tokenizer has tokens.
    """
    size = _tokenizer_size(sidecars)
    if size is None or not 0 < size < rows:
        return rows
    return size if math.ceil(size / multiple) * multiple == rows else rows


def _tokenizer_size(sidecars: Mapping[str, FileReference | bytes]) -> int | None:
    def content(name: str) -> bytes | None:
        found = sidecars.get(name)
        return found.read() if isinstance(found, FileReference) else found

    fast = content("tokenizer.json")
    if fast is not None:
        from tokenizers import Tokenizer

        return int(Tokenizer.from_str(fast.decode("utf-8")).get_vocab_size(with_added_tokens=True))
    slow = content("tokenizer.model")
    if slow is None:
        return None
    from sentencepiece import SentencePieceProcessor

    size = int(SentencePieceProcessor(model_proto=slow).get_piece_size())
    added = json.loads(content("added_tokens.json") or b"{}")
    return max([size, *(int(number) + 1 for number in added.values())])
