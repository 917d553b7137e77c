"""What a run begins with: tokenizer, pairs and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nemo_lmpo.config.schema import Config
from nemo_lmpo.data.preference import PreferenceDataset, load_preference_dataset
from nemo_lmpo.data.tokenizer import check_vocabulary, load_tokenizer
from nemo_lmpo.formats.model_files import open_model
from nemo_lmpo.formats.source import RandomSource, TensorSource
from nemo_lmpo.formats.start_model import StartModel
from nemo_lmpo.model.load_weights import load_model_weights
from nemo_lmpo.parallel.groups import ParallelGroups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class LoadedData:
    """Tokenizer and tokenized pairs."""

    tokenizer: PreTrainedTokenizerBase
    train: PreferenceDataset
    validation: PreferenceDataset | None

    def fingerprints(self) -> dict[str, str]:
        """A hash of all token ids, by split."""
        parts = {"train": self.train, "validation": self.validation}
        return {name: pairs.token_hash() for name, pairs in parts.items() if pairs is not None}


def load_data(config: Config, base: StartModel) -> LoadedData:
    """Tokenize (or read from the cache) what the run trains and validates on."""
    tokenizer = load_tokenizer(base.tokenizer, trust_remote_code=config.model.trust_remote_code)
    check_vocabulary(tokenizer, base.architecture.vocab_size)
    train = load_preference_dataset(config.data, config.data.train, tokenizer, name="train")
    validation = None
    if config.data.validation.path is not None:
        validation = load_preference_dataset(config.data, config.data.validation, tokenizer, name="validation")
    return LoadedData(tokenizer, train, validation)


def load_start_weights(chunks: Sequence[torch.nn.Module], groups: ParallelGroups, base: StartModel, seed: int) -> None:
    """Fill a model with the start's weights; each rank reads its own part."""
    if base.path is not None:
        source: TensorSource = open_model(base.path).source
    else:
        source = RandomSource(base.architecture, seed)
    load_model_weights(
        list(chunks), source, base.architecture, tp_rank=groups.tensor.rank(), tp_size=groups.tensor.size()
    )
