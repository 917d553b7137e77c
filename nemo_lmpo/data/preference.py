"""Preference pairs as token ids: read, checked, templated, tokenized once and cached."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from nemo_lmpo.config.schema import DataConfig, DatasetConfig
from nemo_lmpo.data.cache import cached_directory, default_cache_dir
from nemo_lmpo.data.encode import PairEncoder
from nemo_lmpo.data.pack import pair_tokens
from nemo_lmpo.data.pair import PairTokens
from nemo_lmpo.data.read import Source, open_source
from nemo_lmpo.data.schema import check_schema_name
from nemo_lmpo.data.store import StoreMeta, read_store
from nemo_lmpo.data.summary import DataSummary, SourceSummary, length_percentiles
from nemo_lmpo.data.tokenize import bad_row_error, tokenize_source
from nemo_lmpo.data.tokenizer import chat_template_text, tokenizer_fingerprint
from nemo_lmpo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CODE_VERSION = 1
"""Raised whenever the same input would give other tokens than before: old cache entries are then not used."""

_ROWS_A_BLOCK = 65536

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Tokenised:
    """One source's pairs on disk."""

    source: Source
    key: str
    table: Any
    meta: StoreMeta
    used: np.ndarray
    """Rows of the table that an epoch takes, ``[n]`` int64."""


class PreferenceDataset:
    """Tokenized pairs of one or several sources, by index.

    Make one with :func:`load_preference_dataset`.
    """

    def __init__(
        self, parts: Sequence[_Tokenised], tokenizer: PreTrainedTokenizerBase, name: str, dropped: dict[str, int]
    ) -> None:
        self._tables = [part.table for part in parts]
        self._tokenizer = tokenizer
        self._part = np.concatenate([np.full(len(part.used), i, dtype=np.int32) for i, part in enumerate(parts)])
        self._row = np.concatenate([part.used for part in parts])
        self._pair_ids = _unique_pair_ids(parts)
        self._reference: np.ndarray | None = None
        self.lengths = np.concatenate([_table_lengths(part.table)[part.used] for part in parts])
        """Tokens of prompt, chosen and rejected, ``[N, 3]`` int64."""
        self.fingerprint = _hash([(part.key, hashlib.sha256(part.used.tobytes()).hexdigest()) for part in parts])
        """Changes whenever any pair's tokens or the pairs' order would."""
        self.summary = _summarise(parts, name, dropped, self.lengths)
        """What there is to say of the data at start."""

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: int) -> PairTokens:
        """The pair at ``index``."""
        table, row = self._tables[self._part[index]], int(self._row[index])
        prompt, chosen, rejected = (
            table.column(name)[row].values.to_pylist() for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        )
        sums = [None, None] if self._reference is None else self._reference[index].tolist()
        return PairTokens(self.pair_id(index), prompt, chosen, rejected, sums[0], sums[1], tuple(sums[2:]) or None)

    def pair_id(self, index: int) -> str:
        """The id of a pair; only a pair that an epoch holds several times occurs under one id twice."""
        return self._pair_ids[self._part[index]][int(self._row[index])]

    @property
    def pair_ids(self) -> list[str]:
        """The ids of all pairs in the dataset's order."""
        return [self.pair_id(index) for index in range(len(self))]

    def token_hash(self) -> str:
        """A hash of the token ids of all pairs in the dataset's order: the same wherever they come from."""
        digest = xxhash.xxh3_128(self.lengths.tobytes())
        for number, table in enumerate(self._tables):
            rows = self._row[self._part == number]
            for start in range(0, len(rows), _ROWS_A_BLOCK):
                block = table.take(rows[start : start + _ROWS_A_BLOCK])
                for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
                    for chunk in block.column(name).chunks:
                        digest.update(chunk.flatten().to_numpy(zero_copy_only=False).astype(np.int32).tobytes())
        return digest.hexdigest()

    def attach_reference(
        self,
        pair_ids: Sequence[str],
        chosen_logps: np.ndarray,
        rejected_logps: np.ndarray,
        shared_logps: np.ndarray | None = None,
    ) -> None:
        """Give every pair the log-probabilities of its responses under a reference model.

        Args:
            pair_ids: the pairs that the values belong to, in any order, at least those of this dataset.
            chosen_logps: sums over the chosen response's tokens, ``[len(pair_ids)]``, natural log.
            rejected_logps: the same of the rejected responses.
            shared_logps: the same over the common length of both responses, ``[len(pair_ids), 2]``; optional.

        Raises:
            DataError: a pair has no value, or one that is not finite.
        """
        values = np.stack([np.asarray(chosen_logps), np.asarray(rejected_logps)], axis=1).astype(np.float64)
        if shared_logps is not None:
            values = np.concatenate([values, shared_logps], axis=1)
        places = {pair_id: place for place, pair_id in enumerate(pair_ids)}
        missing = [pair_id for pair_id in self.pair_ids if pair_id not in places]
        if missing:
            raise DataError(
                f"{len(missing)} pairs have no reference log-probabilities (first: {missing[0]}); compute them again"
            )
        reference = values[[places[pair_id] for pair_id in self.pair_ids]]
        broken = np.flatnonzero(~np.isfinite(reference).all(axis=1))
        if len(broken):
            raise DataError(f"the reference log-probability of pair {self.pair_id(int(broken[0]))} is not finite")
        self._reference = reference

    def example_text(self, index: int = 0) -> str:
        """One pair as the model sees it, decoded, with the responses between markers."""
        pair = self[index]
        prompt, chosen, rejected = (
            self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        )
        return (
            f"pair {pair.pair_id} (responses stand between >>> and <<<)\n"
            f"prompt, {len(pair.prompt_ids)} tokens:\n{prompt}\n"
            f"chosen, {len(pair.chosen_ids)} tokens:\n>>>{chosen}<<<\n"
            f"rejected, {len(pair.rejected_ids)} tokens:\n>>>{rejected}<<<"
        )


def load_preference_dataset(
    config: DataConfig, which: DatasetConfig, tokenizer: PreTrainedTokenizerBase, *, name: str = "train"
) -> PreferenceDataset:
    """Read, check and tokenize a preference dataset, or take it from the cache.

    Every process of a run may call this at once; one tokenizes, the others wait.

    Args:
        config: templates, lengths, cache and what to do with bad rows.
        which: the paths, `config.train` or `config.validation`.
        tokenizer: the tokenizer.
        name: `train` or `validation`, for messages.

    Raises:
        ConfigError: a setting is wrong.
        DataError: a source is missing, broken, or has no usable row.
    """
    field = f"data.{name}"
    paths, weights = _check_settings(config, which, field)
    encoder = PairEncoder(
        tokenizer,
        chat_template_text(config.chat_template, tokenizer),
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        system_prompt=config.system_prompt,
    )
    dropped: dict[str, int] = {}
    parts = []
    for number, (path, weight) in enumerate(zip(paths, weights, strict=True)):
        source = open_source(path, which.split, which.limit)
        part = _tokenised(source, encoder, config, which.schema)
        for reason, count in part.meta.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
        kept = _within_budget(part, config, dropped)
        parts.append(_Tokenised(source, part.key, part.table, part.meta, _weighted(kept, weight, number)))
    if not any(len(part.used) for part in parts):
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "the weights take no row"
        raise DataError(f"{field}.path={', '.join(paths)}: no row is left after filtering ({reasons}); check the data")
    return PreferenceDataset(parts, tokenizer, name, dropped)


def _check_settings(config: DataConfig, which: DatasetConfig, field: str) -> tuple[list[str], list[float]]:
    """The paths and weights, after everything that can be checked without reading."""
    if config.on_bad_row not in ("error", "skip"):
        raise ConfigError(f"data.on_bad_row={config.on_bad_row} is unknown; choose error or skip")
    check_schema_name(which.schema, f"{field}.schema")
    paths = [which.path] if isinstance(which.path, str) else list(which.path or [])
    if not paths:
        raise ConfigError(f"{field}.path is not set; give a file, a saved dataset, a hub name or builtin:tiny")
    wrong = [path for path in paths if not isinstance(path, str) or not path]
    if wrong:
        raise ConfigError(f"{field}.path holds {wrong[0]!r}, which is not a path; give texts")
    if which.limit is not None and which.limit < 1:
        raise ConfigError(f"{field}.limit={which.limit} must be at least 1; unset it for all rows")
    weights = [1.0] * len(paths) if which.weights is None else [float(weight) for weight in which.weights]
    if len(weights) != len(paths):
        raise ConfigError(f"{field}.weights has {len(weights)} values for {len(paths)} paths; give one a path")
    if any(not 0 <= weight < float("inf") for weight in weights):
        raise ConfigError(f"{field}.weights={weights} must be finite and not negative")
    if config.row_tokens is not None and config.row_tokens < 1:
        raise ConfigError(f"data.row_tokens={config.row_tokens} must be at least 1; unset it for 2 * data.max_length")
    return paths, weights


def _tokenised(source: Source, encoder: PairEncoder, config: DataConfig, schema: str) -> _Tokenised:
    """The source's pairs from the cache, tokenized before if need be."""
    key = _cache_key(source, encoder, schema)
    cache = Path(config.cache_dir).expanduser() if config.cache_dir else default_cache_dir()

    def build(directory: Path) -> None:
        logger.info("tokenizing %s", source.name)
        tokenize_source(
            source, encoder, schema, directory, on_bad_row=config.on_bad_row, num_workers=config.num_workers
        )

    entry = cached_directory(cache / "pairs", key, build, usable=lambda path: read_store(path) is not None)
    stored = read_store(entry)
    if stored is None:
        raise DataError(f"the cached data in {entry} cannot be read; delete that directory")
    table, meta = stored
    if meta.first_bad is not None and config.on_bad_row == "error":  # cached by a run that skipped
        raise bad_row_error(source, meta.first_bad[0], meta.first_bad[2])
    if meta.rows_read == 0:
        raise DataError(f"{source.name} holds no rows; give a dataset with preference pairs")
    return _Tokenised(source, key, table, meta, np.arange(meta.pairs))


def _cache_key(source: Source, encoder: PairEncoder, schema: str) -> str:
    """A hash of everything that decides the stored pairs."""
    return _hash(
        {
            "version": CODE_VERSION,
            "source": source.fingerprint,
            "ids": source.short_name,
            "schema": schema,
            "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
            "template": encoder.chat.template,
            "system_prompt": encoder.chat.system_prompt,
            "max_length": encoder.max_length,
            "max_prompt_length": encoder.max_prompt_length,
        }
    )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _table_lengths(table: Any) -> np.ndarray:
    import pyarrow.compute as pc

    columns = (table.column(name) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return np.stack([pc.list_value_length(column).to_numpy() for column in columns], axis=1).astype(np.int64)


def _within_budget(part: _Tokenised, config: DataConfig, dropped: dict[str, int]) -> np.ndarray:
    """Rows of the table that fit a packed row on their own."""
    budget = config.row_budget
    costs = pair_tokens(_table_lengths(part.table), config.share_prompt)
    too_long = np.flatnonzero(costs > budget)
    if len(too_long) == 0:
        return part.used
    if config.on_bad_row == "error":
        first = int(too_long[0])
        raise DataError(
            f"{part.source.name}: pair {part.table.column('pair_id')[first]} takes {int(costs[first])} tokens, "
            f"more than data.row_tokens={budget}; raise it (2 * data.max_length always suffices), "
            "lower data.max_length, or set data.on_bad_row=skip"
        )
    dropped["longer than data.row_tokens"] = dropped.get("longer than data.row_tokens", 0) + len(too_long)
    return np.flatnonzero(costs <= budget)


def _weighted(rows: np.ndarray, weight: float, number: int) -> np.ndarray:
    """``rows`` as often as ``weight`` says: whole copies and, of the rest, a fixed random part in the data's order."""
    copies, rest = divmod(weight, 1.0)
    count = round(rest * len(rows))
    keys = np.random.PCG64(np.random.SeedSequence([number, len(rows)])).random_raw(len(rows))
    part = np.sort(np.argsort(keys, kind="stable")[:count])
    return np.concatenate([rows] * int(copies) + [rows[part]])


def _unique_pair_ids(parts: Sequence[_Tokenised]) -> list[list[str]]:
    """Each table's ids; one that an earlier source has too gets its source's name in front."""
    seen: set[str] = set()
    tables = []
    for part in parts:
        ids = part.table.column("pair_id").to_pylist()
        ids = [f"{part.source.name}:{pair_id}" if pair_id in seen else pair_id for pair_id in ids]
        seen.update(ids)
        tables.append(ids)
    return tables


def _summarise(parts: Sequence[_Tokenised], name: str, dropped: dict[str, int], lengths: np.ndarray) -> DataSummary:
    return DataSummary(
        name=name,
        pairs=len(lengths),
        sources=[
            SourceSummary(part.source.name, part.meta.rows_read, part.meta.pairs, len(part.used)) for part in parts
        ],
        dropped=dropped,
        prompts_cut=sum(part.meta.prompts_cut for part in parts),
        responses_cut=sum(part.meta.responses_cut for part in parts),
        length_percentiles=length_percentiles(lengths),
    )
