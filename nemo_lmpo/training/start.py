"""What a run begins with: tokenizer, pairs and weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nemo_lmpo.checkpoint.agreement import from_all_ranks, on_main_rank
from nemo_lmpo.checkpoint.finite import find_not_finite
from nemo_lmpo.checkpoint.run_directory import RunDirectory
from nemo_lmpo.config.rules.settings import CONVERSATION_METRICS, VALIDATION_METRICS
from nemo_lmpo.config.schema import Config
from nemo_lmpo.data.example import CONVERSATIONS
from nemo_lmpo.data.preference import PreferenceDataset, load_preference_dataset, pair_encoder
from nemo_lmpo.data.special_tokens import split_marks
from nemo_lmpo.data.template_day import without_day
from nemo_lmpo.data.tokenizer import check_vocabulary, load_tokenizer
from nemo_lmpo.errors import CheckpointError, ConfigError, counted
from nemo_lmpo.formats.export_record import changed_weights
from nemo_lmpo.formats.grown_source import GrownSource
from nemo_lmpo.formats.model_files import open_model
from nemo_lmpo.formats.source import RandomSource, TensorSource
from nemo_lmpo.formats.start_model import StartModel
from nemo_lmpo.loss.balance import weights_advice
from nemo_lmpo.loss.options import KTOConfig
from nemo_lmpo.model.load_weights import ExpertPart, load_model_weights
from nemo_lmpo.monitor.watchdog import watched
from nemo_lmpo.parallel.groups import ParallelGroups
from nemo_lmpo.parallel.shards import own_part
from nemo_lmpo.runtime.chat_record import ChatRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)


@dataclass
class LoadedData:
    """Tokenizer and tokenized pairs."""

    tokenizer: PreTrainedTokenizerBase
    chat: ChatRecord
    """What made token ids of the pairs."""
    train: PreferenceDataset
    validation: PreferenceDataset | None

    def fingerprints(self) -> dict[str, str]:
        """A hash of all token ids, by split."""
        parts = {"train": self.train, "validation": self.validation}
        return {name: pairs.token_hash() for name, pairs in parts.items() if pairs is not None}


def load_data(config: Config, base: StartModel, run: RunDirectory | None = None) -> LoadedData:
    """Tokenize (or read from the cache) what the run trains and validates on; all ranks call it together.

    A ``run`` that is resumed keeps the chat template that it began with.
    """
    tokenizer = load_tokenizer(base.tokenizer, trust_remote_code=config.model.trust_remote_code)
    check_vocabulary(tokenizer, base.architecture.vocab_size)
    with watched("settling the chat template", config.trainer.step_timeout):
        template: str = on_main_rank(lambda: _settle_template(config, tokenizer, run))
    encoder = pair_encoder(config.data, tokenizer, template)
    takes = config.loss.takes
    train = load_preference_dataset(
        config.data, config.data.train, tokenizer, name="train", template=template, takes=takes
    )
    validation = None
    if config.data.validation.path is not None:
        validation = load_preference_dataset(
            config.data,
            config.data.validation,
            tokenizer,
            name="validation",
            template=template,
            takes=takes,
            kind=train.kind,
        )
    _refuse_other_monitor(config, validation)
    _advise_on_labels(config, train)
    return LoadedData(tokenizer, encoder.record(), train, validation)


def _refuse_other_monitor(config: Config, validation: PreferenceDataset | None) -> None:
    """Conversations have other metrics than pairs and answers, and only the data says which a run has."""
    if validation is None:
        return
    metric = config.checkpoint.monitor.removeprefix("val/")
    elsewhere, here = set(VALIDATION_METRICS), set(CONVERSATION_METRICS)
    if validation.kind != CONVERSATIONS:
        elsewhere, here = here, elsewhere
    if metric in elsewhere - here:
        raise ConfigError(
            f"checkpoint.monitor={config.checkpoint.monitor} is not measured on {validation.summary.kind}; choose "
            + ", ".join(f"val/{name}" for name in sorted(here))
        )


def _advise_on_labels(config: Config, train: PreferenceDataset) -> None:
    """Say how the loss's weights fit the labels of the training data."""
    labels = train.summary.desirable
    if labels is None or not isinstance(config.loss, KTOConfig) or torch.distributed.get_rank() != 0:
        return
    advice = weights_advice(labels, len(train) - labels, config.loss)
    if advice is not None:
        _logger.warning("%s", advice)


def _settle_template(config: Config, tokenizer: PreTrainedTokenizerBase, run: RunDirectory | None) -> str:
    """The text that the run to be resumed keeps; of a new run, what `data.chat_template` stands for."""
    kept = run.kept_template() if run is not None else None
    _warn_of_split_marks(config, tokenizer, kept)
    try:
        asked = pair_encoder(config.data, tokenizer).template
    except ConfigError:
        if kept is None:
            raise
        asked = None
    if kept is not None and asked is not None and without_day(asked) == without_day(kept):
        return kept  # with the day on which the run began
    if kept is not None and asked != kept:
        _logger.warning(
            "data.chat_template=%s %s; the run keeps the template that it began with",
            config.data.chat_template,
            "cannot be read any more" if asked is None else "has another content than when the run began",
        )
    return kept or str(asked)


def _warn_of_split_marks(config: Config, tokenizer: PreTrainedTokenizerBase, kept: str | None) -> None:
    """Say which marks of the template are no tokens, so that a model has to learn them letter by letter."""
    try:
        split = split_marks(kept or pair_encoder(config.data, tokenizer).template, tokenizer)
    except ConfigError:  # told where the template is settled
        return
    if split:
        _logger.warning(
            "the chat template's marks %s are no tokens of this tokenizer: each is split into pieces; "
            "data.add_special_tokens=[%s] makes tokens of them",
            ", ".join(split),
            ",".join(f"'{mark}'" for mark in split),
        )


def load_start_weights(chunks: Sequence[torch.nn.Module], groups: ParallelGroups, base: StartModel, seed: int) -> None:
    """Fill a model with the start's weights; each rank reads its own part. Communicates: small objects over all ranks.

    Raises:
        CheckpointError: the start cannot be read, is an export that was changed since, or holds NaN or infinity.
    """
    if base.path is not None:
        source: TensorSource = open_model(base.path).source
        if base.added_ids:
            source = GrownSource(source, base.architecture.vocab_size, base.added_ids)
        share = torch.distributed.get_rank(), torch.distributed.get_world_size()
        for reason in from_all_ranks(changed_weights(base.path, share)):
            if reason is not None:
                raise CheckpointError(reason)
    else:
        source = RandomSource(base.architecture, seed)
    experts = base.architecture.experts
    load_model_weights(
        list(chunks),
        source,
        base.architecture,
        tp_rank=groups.tensor.rank(),
        tp_size=groups.tensor.size(),
        experts=ExpertPart(
            first=0 if experts is None else groups.expert.rank() * (experts.number // groups.expert.size()),
            tp_rank=groups.expert_tensor.rank(),
            tp_size=groups.expert_tensor.size(),
        ),
    )
    parts = {
        f"{number}.{name}": own_part(parameter).local
        for number, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }
    if (broken := find_not_finite(parts, None)) is not None:
        raise CheckpointError(on_main_rank(lambda: _why_not_finite(source, broken)))


def _why_not_finite(source: TensorSource, broken: str) -> str:
    """Which of the start's own tensors is to blame; reads them all."""
    own = [name for name in source.names() if not source.get(name).isfinite().all()]
    if not own:
        return (
            f"the start model {source.origin} holds numbers that trainer.precision=bf16 cannot hold (they became "
            f"infinite in {broken}); give a start model with smaller weights"
        )
    more = f" and {counted(len(own) - 1, 'other tensor')}" if len(own) > 1 else ""
    return (
        f"the start model {source.origin} holds NaN or infinity in {own[0]}{more}; give a start model whose weights "
        "are finite"
    )
