"""A first look at data, tokenizer and template without tokenizing all: what a dry run can see, a start sees first.

The first rows of every source that is here are laid as the start will lay them, so that what a template does with them
is known before a job waits in a queue.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from nemo_lmpo.config.schema import DataConfig, DatasetConfig
from nemo_lmpo.data.encode import EncodedRow, Encoder
from nemo_lmpo.data.hub import cache_only, downloaded_tokenizer, is_cached_dataset
from nemo_lmpo.data.messages import RowError
from nemo_lmpo.data.raw import RawRow
from nemo_lmpo.data.read import BUILTIN_PREFIX, Source, is_hub_dataset, open_source
from nemo_lmpo.data.rows.form import RowForm
from nemo_lmpo.data.schema import Row
from nemo_lmpo.data.summary import shown_names
from nemo_lmpo.data.text import TextFormat
from nemo_lmpo.data.tokenize import bad_row_error, unused_field_error
from nemo_lmpo.errors import ConfigError, DataError
from nemo_lmpo.runtime.files import is_hub_name

FIRST_ROWS = 16
MOST_SKIPPED = 10_000
"""Rows that are looked through for a usable one where unusable rows are skipped."""


def look_at_data(
    config: DataConfig, encoder: Encoder | None, takes: Sequence[str] = ("pairs",)
) -> tuple[list[str], list[str]]:
    """Refuse sources that are not there, and first rows that cannot be used.

    Args:
        config: the settings.
        encoder: makes token ids of the rows; None: the tokenizer is not here, so rows are only read.
        takes: the kinds of rows that the loss takes.

    Returns:
        The hub names that were not looked at, as nothing is fetched here; and lines on the first rows of each source.

    Raises:
        ConfigError: there is nothing to train on.
        DataError: a source is missing, empty, of an unknown kind, or has no such split; it begins with an unusable row
            while `data.on_bad_row` is `error`, or no row of it is usable.
    """
    if not config.train.path:
        raise ConfigError("data.train.path is not set; give a file, a saved dataset, a hub name or builtin:tiny")
    unseen: list[str] = []
    lines: list[str] = []
    for which in (config.train, config.validation):
        for number, path in enumerate(which.paths):
            look = _SourceLook(config, which, number, encoder, takes)
            if not is_hub_dataset(path) or Path(path).exists():
                lines += look.lines(path)
            elif is_cached_dataset(path.partition(":")[0]):
                with cache_only():
                    lines += look.lines(path)
            else:
                unseen.append(path)
    return list(dict.fromkeys(unseen)), list(dict.fromkeys(lines))


_Laid = EncodedRow | Row | RowError
"""A row as token ids, only read where the tokenizer is not here, or why it cannot be used."""


class _SourceLook:
    """Looks at the first rows of one source."""

    def __init__(
        self, config: DataConfig, which: DatasetConfig, number: int, encoder: Encoder | None, takes: Sequence[str]
    ) -> None:
        self.config = config
        self.which = which
        self.split = which.split_of(number)
        self.form = RowForm(which.schema, which.columns_of(number), tuple(takes))
        self.encoder = encoder
        self._columns: set[str] = set()
        """Columns of usable rows that nothing uses."""

    def lines(self, path: str) -> list[str]:
        """What there is to say of the source's first rows."""
        strict = self.config.on_bad_row == "error"
        most = FIRST_ROWS if strict else MOST_SKIPPED
        text = TextFormat(self.which.encoding, self.which.delimiter)
        source = open_source(path, self.split, min(self.which.limit or most, most), text)
        rows = source.read()
        first = list(islice(rows, FIRST_ROWS))
        results = [(row, self._laid(row)) for row in first]
        if strict:
            self._refuse_bad(source, results)
        elif first and all(isinstance(result, RowError) for _, result in results):
            self._find_usable(source, results, rows)
        return self._told(path, [result for _, result in results])

    def _laid(self, raw: RawRow) -> _Laid:
        try:
            row = self.form.parse(self.form.named(raw).value)
        except RowError as error:
            return error
        result: _Laid = row
        if self.encoder is not None:
            (result,) = self.encoder.encode([row])
        if not isinstance(result, RowError):
            self._columns.update(row.columns)
        return result

    def _refuse_bad(self, source: Source, results: list[tuple[RawRow, _Laid]]) -> None:
        for row, result in results:
            lost = result.lost if isinstance(result, EncodedRow) else ()
            if lost and self.config.on_unused_fields == "error":
                result = unused_field_error(lost)
            if isinstance(result, RowError):
                raise bad_row_error(source.location(row.number), result.detail)

    def _find_usable(
        self,
        source: Source,
        results: list[tuple[RawRow, _Laid]],
        rows: Iterator[RawRow],
    ) -> None:
        seen = len(results)
        for row in rows:
            seen += 1
            if not isinstance(self._laid(row), RowError):
                return
        reasons = Counter(result.reason for _, result in results if isinstance(result, RowError))
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        place, error = source.location(results[0][0].number), results[0][1]
        among = f" among its first {MOST_SKIPPED}" if seen == MOST_SKIPPED else ""
        raise DataError(
            f"{source.name} has no usable row{among} (the first: {counts}; {place}: {error}); check the data"
        )

    def _told(self, path: str, results: list[_Laid]) -> list[str]:
        counts: Counter[str] = Counter()
        for result in results:
            if isinstance(result, RowError):
                counts[f"unusable: {result.reason}"] += 1
            elif isinstance(result, EncodedRow):
                counts.update(f"lose {name}" for name in result.lost)
                counts.update(result.notes)
                counts["prompt cut to data.max_prompt_length"] += result.prompt_cut
                counts["a response cut to data.max_length"] += result.response_cut
                counts["special tokens in their texts"] += result.special_tokens
        found = [f"    {count:>2}  {what}" for what, count in sorted(counts.items()) if count]
        if self._columns:
            found.append(f"    columns that nothing uses: {shown_names(self._columns)}")
        return [f"  {path}: of the first {len(results)} rows", *found] if found else []


def look_at_tokenizer(
    config: DataConfig, name: str, *, vocab_size: int, trust_remote_code: bool, template: str | None = None
) -> Encoder | None:
    """Refuse a tokenizer beside the model, and a template, that no pair could go through.

    ``template`` is the Jinja text of a run that is resumed; by default what `data.chat_template` stands for.

    Returns:
        What makes token ids of pairs; None if the tokenizer is not on this machine: nothing is fetched here.

    Raises:
        ConfigError: the tokenizer cannot be read or has more tokens than the model, or the template is not there or
            does not render.
    """
    from nemo_lmpo.data.preference import pair_encoder
    from nemo_lmpo.data.tokenizer import chat_template_text, check_vocabulary, load_tokenizer

    here = name.startswith(BUILTIN_PREFIX) or Path(name).expanduser().is_dir()
    folder = None if here or not is_hub_name(name, owner=False) else downloaded_tokenizer(name)
    if not here and folder is None:
        if template is None and config.chat_template is not None:
            chat_template_text(config.chat_template, None)
        return None
    tokenizer = load_tokenizer(name if here else str(folder), trust_remote_code=trust_remote_code)
    check_vocabulary(tokenizer, vocab_size)
    return pair_encoder(config, tokenizer, template)
