"""A start model with tokens added to its tokenizer (`data.add_special_tokens`)."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nemo_lmpo.data.tokenizer import load_tokenizer
from nemo_lmpo.errors import ConfigError, shown
from nemo_lmpo.formats.sidecars import sidecar_names
from nemo_lmpo.formats.start_model import StartModel


def with_added_tokens(start: StartModel, tokens: Sequence[str], *, trust_remote_code: bool = False) -> StartModel:
    """The start with special tokens that its tokenizer does not have yet; itself where it has all of them.

    Tokenizer and config stand in a directory that ends with the process. Weights are grown while they are read.

    Raises:
        ConfigError: the tokenizer cannot take a token.
    """
    if not tokens:
        return start
    from tokenizers import AddedToken

    tokenizer = load_tokenizer(start.tokenizer, trust_remote_code=trust_remote_code)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    missing = [token for token in dict.fromkeys(tokens) if token not in special]
    if not missing:
        return start
    known = set(tokenizer.get_vocab().values())
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing], special_tokens=True)
    for token in missing:
        if len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1:
            raise ConfigError(
                f"data.add_special_tokens: the tokenizer of {start.tokenizer} cannot take {shown(token)} as a token; "
                "leave it out"
            )
    ids = sorted(int(tokenizer.convert_tokens_to_ids(token)) for token in missing)
    vocab_size = max(start.architecture.vocab_size, max(tokenizer.get_vocab().values()) + 1)
    directory = Path(tempfile.mkdtemp(prefix="nemo_lmpo_tokens_"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    if start.sidecars is not None:
        for name in sidecar_names(start.sidecars):
            (directory / name).parent.mkdir(exist_ok=True, parents=True)
            shutil.copyfile(start.sidecars / name, directory / name)
        _set_vocabulary(directory / "config.json", vocab_size)
    tokenizer.save_pretrained(directory)
    return replace(
        start,
        architecture=replace(start.architecture, vocab_size=vocab_size),
        tokenizer=str(directory),
        sidecars=directory if start.sidecars is not None else None,
        added_ids=tuple(token for token in ids if token not in known),
    )


def _set_vocabulary(config: Path, vocab_size: int) -> None:
    if config.is_file():
        values = json.loads(config.read_text())
        values["vocab_size"] = vocab_size
        config.write_text(json.dumps(values, indent=1))
