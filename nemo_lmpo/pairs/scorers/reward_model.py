"""Scores by a reward model in this process: a Hugging Face model for sequence classification with one value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_lmpo.answers.engine import choose_device
from nemo_lmpo.answers.in_process import DTYPES, default_dtype
from nemo_lmpo.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from nemo_lmpo.errors import CheckpointError, ConfigError, first_line
from nemo_lmpo.pairs.score import Keep, Missing
from nemo_lmpo.pairs.scorers.conversation import RewardRendering, rendering
from nemo_lmpo.pairs.scorers.reward_files import UNBOUNDED, find_reward_model, weights_of
from nemo_lmpo.runtime.files import content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS = "logits"


@dataclass(frozen=True)
class RewardOptions:
    """How a reward model runs."""

    model: str
    batch_size: int | None = None
    """None: 8, or 1 for models with code of their own, which may not know padding."""
    device: str | None = None
    dtype: str | None = None
    trust_remote_code: bool = False
    field: str = LOGITS
    """Of the model's output, that holds the score."""
    template: str | None = None


@dataclass(frozen=True)
class RewardModelScorer:
    """Scores conversations in batches of similar length."""

    options: RewardOptions
    directory: Path
    rendering: RewardRendering
    weights_sha256: str
    device: str
    dtype: str
    batch_size: int

    def identity(self) -> Mapping[str, Any]:
        """The model's content, and how it is computed."""
        import transformers

        return {
            "reward model": self.weights_sha256,
            "template": content_hash(self.rendering.template),
            "tokenizer": tokenizer_fingerprint(self.rendering.tokenizer),
            "field": self.options.field,
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "device": self.device,
            "backend": f"transformers {transformers.__version__}, torch {torch.__version__}",
        }

    def score(self, prompts: Missing, missing: set[str], keep: Keep) -> None:
        """A batch at a time. Batches follow from all candidates, so a command that resumes makes the same ones.

        Raises:
            UserError: the model cannot be loaded, or does not give one value.
        """
        ids = self.rendering.all_ids(prompts, keep)
        order = sorted(ids, key=lambda name: (len(ids[name]), name))
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        waiting = [batch for batch in batches if not missing.isdisjoint(batch)]
        if not waiting:
            return
        model = load_reward_model(self.directory, self.options, DTYPES[self.dtype]).to(self.device).eval()
        for batch in waiting:
            keep(dict(zip(batch, rewards(model, [ids[name] for name in batch], self.options.field), strict=True)))


def open_reward_model(options: RewardOptions) -> RewardModelScorer:
    """Find a reward model and look at all of it but its weights.

    Raises:
        ConfigError: it has several labels, or no chat template.
        CheckpointError: no such model.
    """
    directory = find_reward_model(options.model)
    config = _config(directory, options)
    if options.field == LOGITS and config.num_labels != 1:
        raise ConfigError(
            f"--reward-model {options.model} has {config.num_labels} labels; a reward model has one (num_labels: 1), "
            "or a field with the score, which --score-field names"
        )
    tokenizer = load_tokenizer(str(directory), trust_remote_code=options.trust_remote_code)
    most = getattr(config, "max_position_embeddings", None) or UNBOUNDED
    device = choose_device(options.device)
    return RewardModelScorer(
        options,
        directory,
        rendering(tokenizer, options.template, most, options.model),
        weights_of(directory),
        device,
        options.dtype or default_dtype(device),
        options.batch_size or (1 if options.trust_remote_code else 8),
    )


def _config(directory: Path, options: RewardOptions) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError) as error:
        remedy = (
            "it comes with code of its own: say --trust-remote-code if you trust it"
            if "trust_remote_code" in str(error)
            else "give a Hugging Face directory or hub name"
        )
        raise CheckpointError(
            f"--reward-model {options.model} has no configuration that can be read ({first_line(error)}); {remedy}"
        ) from None


def load_reward_model(directory: Path, options: RewardOptions, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights, on the CPU.

    Raises:
        CheckpointError: it cannot be loaded, or lacks weights: transformers would fill a head with random numbers.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # of the head that is missing, the error below tells
    logging.disable_progress_bar()
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            directory, dtype=dtype, trust_remote_code=options.trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(
            f"--reward-model {options.model} cannot be loaded ({first_line(error)}); give a model for sequence "
            "classification"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    absent = sorted(found["missing_keys"])
    if absent:
        raise CheckpointError(
            f"--reward-model {options.model} has no weights for {absent[0]}"
            f"{f' and {len(absent) - 1} more' if len(absent) > 1 else ''}: it is a model without a head for scores; "
            "give a reward model"
        )
    loaded: PreTrainedModel = model
    return loaded


@torch.inference_mode()
def rewards(model: PreTrainedModel, conversations: Sequence[Sequence[int]], field: str = LOGITS) -> list[float]:
    """Scores of conversations given as token ids, padded on the right to one batch.

    Padding changes no score but by rounding: no token sees what stands behind it.

    Args:
        model: for sequence classification.
        conversations: token ids of each.
        field: of the model's output.

    Raises:
        ConfigError: the output has no such field, or more than one value a conversation.
    """
    width = max(map(len, conversations))
    with padding_of(model, conversations) as pad:
        ids = torch.tensor([[*one, *[pad] * (width - len(one))] for one in conversations], device=model.device)
        mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in conversations], device=model.device)
        output = model(input_ids=ids, attention_mask=mask)
    value = output.get(field) if isinstance(output, Mapping) else getattr(output, field, None)
    if not isinstance(value, Tensor):
        known = ", ".join(output) if isinstance(output, Mapping) else "none"
        raise ConfigError(f"--score-field {field} is not in what the reward model returns; its fields are {known}")
    if value.numel() != len(conversations):
        raise ConfigError(
            f"the reward model's field {field} has the shape {list(value.shape)} for {len(conversations)} "
            "conversations; a score is one value each: name another field with --score-field"
        )
    scores: list[float] = value.reshape(-1).float().tolist()
    return scores


@contextmanager
def padding_of(model: PreTrainedModel, conversations: Sequence[Sequence[int]]) -> Iterator[int]:
    """The id to pad with, by which the model finds each conversation's last token.

    A model takes the last token that is not `pad_token_id`. One without that takes the last of the row, and refuses
    batches; within the context it has an id that no conversation holds, with the same effect.
    """
    config: Any = model.config
    given = config.pad_token_id
    if given is not None:
        yield int(given)
        return
    used = {token for one in conversations for token in one}
    config.pad_token_id = next(token for token in range(config.vocab_size) if token not in used)
    try:
        yield config.pad_token_id
    finally:
        config.pad_token_id = None
