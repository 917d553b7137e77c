"""Tokenizers: from a directory, a hub name or built in; their chat template; their fit to a model."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_lmpo.data.cache import user_path
from nemo_lmpo.data.hub import cache_only_without_network, downloaded_tokenizer
from nemo_lmpo.data.read import BUILTIN_PREFIX
from nemo_lmpo.data.sentencepiece_bpe import load_sentencepiece_directory
from nemo_lmpo.data.templates import RELEASED_TEMPLATES, TEMPLATES
from nemo_lmpo.errors import ConfigError, first_line, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILTIN_TOKENIZERS = ("tiny",)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        name: a directory with `tokenizer.json` (or a SentencePiece BPE `tokenizer.model`), a hub name, or
            `builtin:NAME`.
        trust_remote_code: whether code that comes with it may run.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    if name.startswith(BUILTIN_PREFIX):
        return _builtin(name.removeprefix(BUILTIN_PREFIX))
    directory = user_path(name, "model.tokenizer")
    if directory.is_dir():
        if not (directory / "tokenizer.json").exists() and (directory / "tokenizer.model").exists():
            # transformers would build a subtly different tokenizer from it (merge order, first space)
            return load_sentencepiece_directory(directory)
        name = str(directory)
    elif directory.is_absolute() or name.startswith((".", "~")) or directory.exists():
        raise ConfigError(f"model.tokenizer={name} is not a directory; give a tokenizer directory or a hub name")
    from transformers import AutoTokenizer

    try:
        with contextlib.nullcontext() if directory.is_dir() else cache_only_without_network():
            if not directory.is_dir() and _has_sentencepiece_alone(name):
                return load_tokenizer(str(downloaded_tokenizer(name)), trust_remote_code=trust_remote_code)
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        if tokenizer is not None and len(tokenizer):
            tokenizer("a")  # some settings are looked at only now
    # Damaged files make these libraries raise errors of any kind: TypeError, AttributeError, bare Exception.
    except Exception as error:
        raise ConfigError(
            f"model.tokenizer={name} cannot be loaded ({first_line(error)}); "
            "give a directory with tokenizer.json or a hub name"
        ) from None
    if tokenizer is None or len(tokenizer) == 0:
        raise ConfigError(f"model.tokenizer={name} holds no vocabulary; the directory needs its tokenizer.json")
    return tokenizer


def _has_sentencepiece_alone(name: str) -> bool:
    """Whether a hub's tokenizer is a `tokenizer.model` without `tokenizer.json`; brings it to this machine."""
    from huggingface_hub import snapshot_download

    from nemo_lmpo.formats.sidecars import TOKENIZER_PATTERNS

    folder = Path(snapshot_download(name, allow_patterns=list(TOKENIZER_PATTERNS)))
    return (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()


def _builtin(name: str) -> PreTrainedTokenizerBase:
    if name not in BUILTIN_TOKENIZERS:
        known = ", ".join(BUILTIN_PREFIX + known for known in BUILTIN_TOKENIZERS)
        raise ConfigError(f"model.tokenizer={BUILTIN_PREFIX}{name} does not exist; the builtin ones are: {known}")
    from nemo_lmpo.data.builtin.tiny_tokenizer import tiny_tokenizer

    return tiny_tokenizer()


def chat_template_text(
    choice: str | None, tokenizer: PreTrainedTokenizerBase | None, *, released_code: bool = False
) -> str:
    """The Jinja text of `data.chat_template`.

    Args:
        choice: None (the tokenizer's own), the name of one of several that it has, of a built-in one, or a file.
        tokenizer: whose own template is meant; None: it is not here.
        released_code: names mean what the released trainers have under them.

    Raises:
        ConfigError: the tokenizer has none, or the choice is neither a name nor a readable file.
    """
    own = getattr(tokenizer, "chat_template", None)
    names = list(own) if isinstance(own, dict) else []
    if choice is None and tokenizer is not None:
        try:
            return str(tokenizer.get_chat_template())
        except ValueError:
            pass
    if choice is None and names:
        raise ConfigError(
            "the tokenizer has several chat templates and none called default; set data.chat_template to one of "
            f"{', '.join(names)}"
        )
    if choice is None:
        raise ConfigError(
            "the tokenizer has no chat template; set data.chat_template to a file or one of "
            f"{', '.join(TEMPLATES)} (plain: texts as they are)"
        )
    if isinstance(own, dict) and choice in own:
        return str(own[choice])
    if released_code and choice in RELEASED_TEMPLATES:
        return RELEASED_TEMPLATES[choice]
    if choice in TEMPLATES:
        return TEMPLATES[choice]
    path = user_path(choice, "data.chat_template")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        near = nearest(choice, TEMPLATES)
        hint = f"did you mean '{near}'? " if near else ""
        raise ConfigError(
            f"data.chat_template={choice} is neither a readable file nor a built-in template; {hint}"
            f"the built-in ones are: {', '.join(TEMPLATES)}"
        ) from None
    if not text.strip():
        raise ConfigError(f"data.chat_template={choice} is an empty file; write a Jinja template into it")
    return text


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuse a tokenizer that can give ids the model has no embedding for.

    Raises:
        ConfigError: an id of the tokenizer is not below ``vocab_size``.
    """
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocab_size:
        raise ConfigError(
            f"model.tokenizer has token ids up to {largest}, but the model's vocab_size is {vocab_size}; "
            f"use the model's own tokenizer, or a model with vocab_size of at least {largest + 1}"
        )


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills rows; which one is of no consequence, as nothing sees or predicts it."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides the ids of a text; the chat template is not part of it."""
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        digest.update(backend.to_str().encode())
    else:
        digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
        digest.update(repr(sorted(tokenizer.init_kwargs.items(), key=lambda item: item[0])).encode())
    digest.update(repr((type(tokenizer).__name__, tokenizer.bos_token_id, tokenizer.eos_token_id)).encode())
    digest.update(repr(tokenizer("a")["input_ids"]).encode())
    return digest.hexdigest()
