"""A first look at data, tokenizer and template without tokenizing: what a dry run can see, and a start sees first."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from nemo_lmpo.config.schema import DataConfig, DatasetConfig
from nemo_lmpo.data.messages import RowError
from nemo_lmpo.data.read import BUILTIN_PREFIX, is_hub_name, open_source
from nemo_lmpo.data.schema import parse_row
from nemo_lmpo.data.tokenize import bad_row_error
from nemo_lmpo.errors import ConfigError

FIRST_ROWS = 16


def look_at_data(config: DataConfig) -> list[str]:
    """Refuse sources that are not there, and first rows that cannot be used.

    Returns:
        The hub names that were not looked at: nothing is fetched here.

    Raises:
        ConfigError: there is nothing to train on.
        DataError: a source is missing, empty, of an unknown kind, has no such split, or begins with an unusable row
            while `data.on_bad_row` is `error`.
    """
    if not config.train.path:
        raise ConfigError("data.train.path is not set; give a file, a saved dataset, a hub name or builtin:tiny")
    unseen: list[str] = []
    for which in (config.train, config.validation):
        for path in which.paths:
            if is_hub_name(path) and not Path(path).exists():
                unseen.append(path)
            else:
                _look_at_source(path, which, strict=config.on_bad_row == "error")
    return list(dict.fromkeys(unseen))


def _look_at_source(path: str, which: DatasetConfig, *, strict: bool) -> None:
    source = open_source(path, which.split, min(which.limit or FIRST_ROWS, FIRST_ROWS))
    for row in islice(source.read(), FIRST_ROWS) if strict else ():
        try:
            parse_row(row.value, which.schema)
        except RowError as error:
            raise bad_row_error(source.location(row.number), error.detail) from None


def look_at_tokenizer(
    config: DataConfig, name: str, *, vocab_size: int, trust_remote_code: bool, template: str | None = None
) -> bool:
    """Refuse a tokenizer beside the model, and a template, that no pair could go through.

    ``template`` is the Jinja text of a run that is resumed; by default what `data.chat_template` stands for.

    Returns:
        Whether the tokenizer is on this machine; nothing is fetched here.

    Raises:
        ConfigError: the tokenizer cannot be read or has more tokens than the model, or the template does not render.
    """
    if not name.startswith(BUILTIN_PREFIX) and not Path(name).expanduser().is_dir():
        return False
    from nemo_lmpo.data.preference import pair_encoder
    from nemo_lmpo.data.tokenizer import check_vocabulary, load_tokenizer

    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    check_vocabulary(tokenizer, vocab_size)
    pair_encoder(config, tokenizer, template)
    return True
