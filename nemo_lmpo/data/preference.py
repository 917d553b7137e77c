"""Preference pairs as token ids: read, checked, templated, tokenized once and cached."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_lmpo.config.schema import DataConfig, DatasetConfig
from nemo_lmpo.data.cache import cache_root, cached_directory
from nemo_lmpo.data.encode import Encoder, PairEncoder
from nemo_lmpo.data.epoch import Epoch, Lengths
from nemo_lmpo.data.example import ANSWERS, PAIRS, Example, Response
from nemo_lmpo.data.parts import Part, first_unusable, kind_of_examples, make_part, source_names, summarise
from nemo_lmpo.data.read import Source, open_source
from nemo_lmpo.data.released import ReleasedPairEncoder
from nemo_lmpo.data.rows.form import RowForm
from nemo_lmpo.data.show import example_text
from nemo_lmpo.data.special_tokens import SpecialTokens
from nemo_lmpo.data.store import Store, read_store
from nemo_lmpo.data.template_day import with_day
from nemo_lmpo.data.text import TextFormat
from nemo_lmpo.data.tokenize import bad_row_error, tokenize_source
from nemo_lmpo.data.tokenizer import chat_template_text, tokenizer_fingerprint
from nemo_lmpo.errors import ConfigError, DataError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nemo_lmpo.data.mismatched import MismatchedAnswers

CODE_VERSION = 5
"""Raised whenever the same input would give other tokens than before, or in another form: old cache entries are then
not used."""

logger = logging.getLogger(__name__)


class PreferenceDataset:
    """Tokenized pairs of one or several sources, by index.

    What has a value for each pair is mapped into memory or computed; only reference log-probabilities are held.
    Make one with :func:`load_preference_dataset`.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        dropped: dict[str, int],
        max_length: int,
        kind: str,
    ) -> None:
        self.kind = kind
        """What the examples are: `pairs`, `conversations` or `answers`."""
        self.num_responses = 2 if kind == PAIRS else 1
        """Responses of each example."""
        self.mismatched: MismatchedAnswers | None = None
        """The same prompts with answers of other examples, where the loss compares with these."""
        self._parts = list(parts)
        self._epoch = Epoch([part.share for part in parts])
        self.source_names = source_names([part.source.short_name for part in parts])
        """What metrics and pair ids call the sources."""
        self.lengths = Lengths(self._epoch, self.num_responses)
        """Tokens of prompt, chosen and rejected, ``[N, 3]``: index it like an array."""
        self._tokenizer = tokenizer
        self._reference: np.ndarray | None = None
        self.fingerprint = self._hashed([part.fingerprint(part.key) for part in parts])
        """Changes whenever any pair's tokens or the pairs' order would; the same in every process."""
        self.summary = summarise(parts, name, dropped, max_length, kind)
        """What there is to say of the data at start."""

    def __len__(self) -> int:
        return len(self._epoch)

    def __getitem__(self, index: int) -> Example:
        """The example at ``index``."""
        source, row = self._epoch.locate(index)
        found = self._epoch.shares[source].store.example(row, self.kind)
        return replace(found, example_id=self.example_id(index), responses=self._with_reference(found, index))

    def _with_reference(self, found: Example, index: int) -> tuple[Response, ...]:
        """The example's responses with what the reference model gives them."""
        if self._reference is None:
            return found.responses
        sums, shared = np.split(self._reference[index], [self.num_responses])
        return tuple(
            replace(
                response,
                reference_logp=float(sums[place]),
                reference_shared_logp=float(shared[place]) if len(shared) else None,
            )
            for place, response in enumerate(found.responses)
        )

    def _hashed(self, parts: list[Any]) -> str:
        """A hash of what decides the examples; pairs that are taken as something else are other examples."""
        return _hash(parts if self.kind == PAIRS else [*parts, self.kind if self.kind == ANSWERS else 1])

    def example_id(self, index: int) -> str:
        """The id of a pair, behind its source's name where there are several sources.

        Only a pair that an epoch holds several times occurs under one id twice.
        """
        source, row = self._epoch.locate(index)
        name = self._epoch.shares[source].store.example_id(row)
        return name if len(self.source_names) == 1 else f"{self.source_names[source]}:{name}"

    def sources(self, indices: np.ndarray) -> np.ndarray:
        """Which of :attr:`source_names` the pairs at ``indices`` come from, as numbers."""
        return self._epoch.sources(np.asarray(indices))

    def token_hash(self) -> str:
        """A hash of the token ids of all pairs in the dataset's order: the same wherever they come from.

        The ids are hashed when a source is tokenized, so this costs nothing at a start.
        """
        return self._hashed([part.fingerprint(part.share.store.meta.token_hash) for part in self._parts])

    def attach_reference(self, logps: np.ndarray) -> None:
        """Give every example the log-probabilities of its responses under a reference model.

        Args:
            logps: sums over the tokens of the chosen and of the rejected response of each pair, in the dataset's
                order, ``[N, 2]``, natural log; or ``[N, 4]``, behind them the same over the responses' common length;
                or of each example's only response, ``[N, 1]``.

        Raises:
            DataError: there are values for other pairs than these, or one is not finite.
        """
        if logps.shape not in ((len(self), self.num_responses), (len(self), 2 * self.num_responses)):
            raise DataError(f"there are reference log-probabilities {logps.shape} for {len(self)} {self.kind}")
        values = logps.astype(np.float32)
        broken = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(broken):
            name = shown(self.example_id(int(broken[0])))
            raise DataError(f"the reference log-probability of {self.kind[:-1]} {name} is not finite")
        self._reference = values

    @property
    def first_unusable(self) -> list[str]:
        """Place and reason of the first row of each source that is not used."""
        return first_unusable(self._parts)

    def example_text(self, index: int = 0) -> str:
        """One example as the model sees it, decoded, with what is predicted between markers."""
        return example_text(self[index], self._tokenizer)


def load_preference_dataset(
    config: DataConfig,
    which: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "train",
    template: str | None = None,
    takes: Sequence[str] = ("pairs",),
    kind: str | None = None,
) -> PreferenceDataset:
    """Read, check and tokenize a dataset, or take it from the cache.

    Where any row is a conversation, all are taken as conversations: of a pair, its prompt and its chosen response.
    Where any row is an answer with a label, all are taken as such: of a pair, its chosen response as a good answer and
    its rejected one as a bad one.

    Every process of a run may call this at once; one tokenizes, the others wait.

    Args:
        config: templates, lengths, cache and what to do with bad rows.
        which: the paths, `config.train` or `config.validation`.
        tokenizer: the tokenizer.
        name: `train` or `validation`, for messages.
        template: as for :func:`pair_encoder`.
        takes: the kinds of rows that the loss takes.
        kind: `conversations` and `answers` take pairs as such, and `pairs` refuses others; unset: as the rows are.

    Raises:
        ConfigError: a setting is wrong.
        DataError: a source is missing, broken, or has no usable row.
    """
    field = f"data.{name}"
    paths = which.paths
    if not paths:
        raise ConfigError(f"{field}.path is not set; give a file, a saved dataset, a hub name or builtin:tiny")
    weights = [1.0] * len(paths) if which.weights is None else which.weights
    encoder = pair_encoder(config, tokenizer, template)
    dropped: dict[str, int] = {}
    text = TextFormat(which.encoding, which.delimiter)
    sources = [open_source(path, which.split_of(number), which.limit, text) for number, path in enumerate(paths)]
    tokenized = [
        _tokenized(source, encoder, config, RowForm(which.schema, which.columns_of(number), tuple(takes)))
        for number, source in enumerate(sources)
    ]
    kind = kind_of_examples(field, [store for _, store in tokenized], kind)
    parts = [
        make_part(source, key, store, (weight, number), config, dropped, kind)
        for number, (source, (key, store), weight) in enumerate(zip(sources, tokenized, weights, strict=True))
    ]
    if not any(len(part.share) for part in parts):
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "the weights take no row"
        said = "; ".join([reasons, *first_unusable(parts)[:1]])
        raise DataError(f"{field}.path={', '.join(paths)}: no row is left after filtering ({said}); check the data")
    return PreferenceDataset(parts, tokenizer, name, dropped, config.max_length, kind)


def pair_encoder(config: DataConfig, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> Encoder:
    """What makes token ids of pairs under these settings.

    Args:
        config: the settings.
        tokenizer: of the model.
        template: Jinja text; by default what `data.chat_template` stands for. One that writes the day gets
            `data.template_date`, or today.

    Raises:
        ConfigError: there is no such template, or it does not fit the tokenizer, or lengths that leave no room.
    """
    released = config.compat == "released_code"
    make = ReleasedPairEncoder if released else PairEncoder
    template = template or chat_template_text(config.chat_template, tokenizer, released_code=released)
    return make(
        tokenizer,
        with_day(template, config.template_date),
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        system_prompt=config.system_prompt,
        prompt_from=config.prompt_from,
        predict=config.predict,
        special=SpecialTokens(tokenizer, config.special_tokens_in_text),
    )


def _tokenized(source: Source, encoder: Encoder, config: DataConfig, form: RowForm) -> tuple[str, Store]:
    """The source's examples from the cache, tokenized before if need be, and what they are called there."""
    key = _cache_key(source, encoder, form, config.on_unused_fields)
    cache = cache_root(config.cache_dir)

    def build(directory: Path) -> None:
        logger.info("tokenizing %s", source.name)
        tokenize_source(
            source,
            encoder,
            form,
            directory,
            on_bad_row=config.on_bad_row,
            on_unused_fields=config.on_unused_fields,
            num_workers=config.num_workers,
        )

    opened: list[Store | None] = [None]

    def usable(directory: Path) -> bool:
        opened[0] = read_store(directory)
        return opened[0] is not None

    entry = cached_directory(cache / "pairs", key, build, usable)
    store = opened[0] or read_store(entry)
    if store is None:
        raise DataError(f"the cached data in {entry} cannot be read; delete that directory")
    meta = store.meta
    if meta.first_bad is not None and config.on_bad_row == "error":  # cached by a run that skipped
        raise bad_row_error(source.location(meta.first_bad[0]), meta.first_bad[2])
    if meta.rows_read == 0:
        raise DataError(f"{source.name} holds no rows; give a dataset with rows")
    return key, store


def _cache_key(source: Source, encoder: Encoder, form: RowForm, on_unused_fields: str) -> str:
    """A hash of everything that decides the stored rows."""
    return _hash(
        {
            "version": CODE_VERSION,
            "source": source.fingerprint,
            "ids": source.short_name,
            **form.key(),
            "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
            "encoder": encoder.settings,
            "special_tokens": encoder.special_tokens.policy,
            "on_unused_fields": on_unused_fields,
        }
    )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
