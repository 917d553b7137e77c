"""Log-probabilities under a frozen reference model, for losses that compare with one, as DPO.

The reference is the model that training starts from, or `model.reference_from_path`. Usually its log-probabilities are
computed once before training, with the policy itself while it still holds the start weights, and kept on disk; then no
second model is in memory. A reference of its own is in memory for that pass only. With `model.reference_in_memory` a
second, frozen model computes them for every batch.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from nemo_lmpo.checkpoint.agreement import on_main_rank
from nemo_lmpo.config.schema import Config
from nemo_lmpo.data.cache import cache_root, cached_directory
from nemo_lmpo.data.example import ANSWERS, CONVERSATIONS, PAIRS
from nemo_lmpo.data.mismatched import MismatchedAnswers
from nemo_lmpo.data.order import PairSampler, validation_steps
from nemo_lmpo.data.preference import PreferenceDataset
from nemo_lmpo.data.tokenizer import tokenizer_fingerprint
from nemo_lmpo.errors import CheckpointError, ConfigError
from nemo_lmpo.formats.fingerprint import weights_fingerprint
from nemo_lmpo.formats.start_model import StartModel
from nemo_lmpo.loss.options import SFTConfig
from nemo_lmpo.loss.registry import build_loss
from nemo_lmpo.model.lora import adapters_off
from nemo_lmpo.monitor.watchdog import watched
from nemo_lmpo.training.ahead import BatchesAhead
from nemo_lmpo.training.batches import BatchBuilder, StepBatch
from nemo_lmpo.training.pair_metrics import CHOSEN_SHARED, REJECTED_SHARED
from nemo_lmpo.training.pipeline import run_pipeline
from nemo_lmpo.training.policy import Policy, build_frozen_chunks
from nemo_lmpo.training.response_metrics import LOGPS
from nemo_lmpo.training.start import LoadedData, load_start_weights
from nemo_lmpo.training.start_model import find_start_model
from nemo_lmpo.training.step import MicroBatchStep

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 2
"""Raised whenever the same weights and pairs would give other log-probabilities than before."""
LOGPS_FILE = "logps.npy"
META_FILE = "meta.json"
SUMS = ("logps/chosen_sum", "logps/rejected_sum", CHOSEN_SHARED, REJECTED_SHARED)
"""What is kept of each pair; all of it, so that every loss finds what it needs."""
KEPT = {PAIRS: SUMS, ANSWERS: (LOGPS,), CONVERSATIONS: (LOGPS,)}
"""What is kept of each example, by kind."""

_logger = logging.getLogger(__name__)


class ResponseSums:
    """Sums of response log-probabilities under a model's present weights, in the policy's layout."""

    def __init__(self, policy: Policy, chunks: Sequence[Any] | None = None) -> None:
        """Of this process's ``chunks``, wrapped or bare, which lie as the policy's own do; unset: of these."""
        self.chunks = list(policy.chunks if chunks is None else chunks)
        self.groups = policy.groups
        # SFT's loss needs no reference, so it can run where there is none yet; only the sums are taken.
        self.step = MicroBatchStep(
            build_loss(SFTConfig()),
            policy.groups,
            chunk_tokens=policy.micro_batch_step.chunk_tokens,
            device=policy.device,
            shared_logps=True,
        )

    def __call__(self, batch: StepBatch) -> Tensor:
        """Sums of the whole global batch on every rank, ``[pairs, 4]`` or ``[answers, 1]`` float64.

        Of pairs chosen and rejected, then both over the common length of the two responses.
        """
        table = self.step.begin(batch.num_examples, kind=batch.kind, mean_length=batch.mean_length)
        run_pipeline(self.chunks, batch.micro_batches, self.step.forward_step, forward_only=True)
        table.share(self.groups)
        return torch.stack([table.column(name) for name in KEPT[batch.kind]], dim=1)

    def attach(self, batch: StepBatch) -> None:
        """Give every micro-batch its sums as those of the reference; one forward pass."""
        values = self(batch).float()
        for micro_batch in batch.micro_batches:
            micro_batch.reference_logps = values[micro_batch.example_index]


@dataclass(frozen=True)
class ReferenceKey:
    """Everything that decides the reference log-probabilities of a dataset, but for rounding."""

    weights: str
    data: str
    tokenizer: str
    precision: str
    version: int = VERSION

    def digest(self) -> str:
        """The cache entry's name."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


class ReferenceLogps:
    """Computes reference log-probabilities before training, or takes them from the cache.

    Only rank 0 touches the cache; the other ranks get the values from it.
    """

    def __init__(
        self, policy: Policy, base: StartModel, tokenizer: PreTrainedTokenizerBase, batches: BatchBuilder
    ) -> None:
        """Take what computing needs; the policy must still hold the start weights.

        Args:
            policy: what is trained.
            base: what it started from.
            tokenizer: of both.
            batches: builds rows of pairs.

        Raises:
            UserError: the reference is another model than the policy.
        """
        self.config = config = policy.config
        self.base = base
        self.sums = ResponseSums(policy)
        if config.model.reference_from_path is not None:
            base = reference_model(config, base)
            self.sums = ResponseSums(policy, load_reference(policy, base))
        self.batches = batches
        self.root = cache_root(config.data.cache_dir) / "reference"
        with watched("reading the start model", config.trainer.step_timeout):
            self.weights: str = on_main_rank(
                lambda: weights_fingerprint(base.path, base.architecture, config.model.seed)
            )
            self.tokenizer: str = on_main_rank(lambda: tokenizer_fingerprint(tokenizer))

    def attach(self, dataset: PreferenceDataset | MismatchedAnswers, name: str) -> None:
        """Give every example of ``dataset`` its reference log-probabilities.

        Communicates: the layout's own when they are computed, and a broadcast over all ranks.
        """
        key = ReferenceKey(self.weights, dataset.fingerprint, self.tokenizer, self.config.trainer.precision)
        entry = self.root / key.digest()
        with watched(f"reading the kept reference ({name})", self.config.trainer.step_timeout):
            values = on_main_rank(lambda: read_entry(entry, key, len(dataset), len(KEPT[dataset.kind])))
        if values is None:
            values = self._compute(dataset, name)
            with watched(f"keeping the reference ({name})", self.config.trainer.step_timeout):
                on_main_rank(lambda: self._keep(entry, key, values))
        else:
            _logger.info("reference log-probabilities of %d %s %s: from %s", len(dataset), name, dataset.kind, entry)
        shared = dataset.kind == PAIRS and build_loss(self.config.loss).needs_shared_logps
        dataset.attach_reference(values if shared else values[:, : dataset.num_responses])

    def _order(self, dataset: PreferenceDataset | MismatchedAnswers, name: str) -> np.ndarray:
        """Where no order has to be kept, examples of similar length together, which makes fewer rows.

        A mixture's are laid in rows as the first epoch, or validation, lays them: rounding differs with a row, and
        where it makes a router choose another expert, the policy would not start as its reference.
        """
        by_length = np.argsort(np.asarray(dataset.lengths).sum(axis=1), kind="stable")
        if self.base.architecture.experts is None:
            return by_length
        if "train" not in name:
            return np.arange(len(dataset))
        model = self.config.model
        sampler = PairSampler(len(dataset), model.global_batch_size, model.seed)
        steps = [sampler.pairs_of_step(step) for step in range(sampler.steps_per_epoch)]
        left = by_length[~np.isin(by_length, np.concatenate(steps))]
        return np.concatenate([*steps, left])

    def _compute(self, dataset: PreferenceDataset | MismatchedAnswers, name: str) -> np.ndarray:
        _logger.info("computing reference log-probabilities of %d %s %s", len(dataset), name, dataset.kind)
        size = self.config.model.global_batch_size
        order = self._order(dataset, name)
        values = np.zeros((len(dataset), len(KEPT[dataset.kind])))
        hidden = dist.get_rank() != 0 or not self.config.logging.progress_bar
        title, unit = f"reference ({name})", dataset.kind[:-1]
        with tqdm(total=len(dataset), desc=title, unit=unit, disable=hidden or None) as bar:
            steps = [order[step] for step in validation_steps(len(dataset), size)]
            with closing(BatchesAhead(self.batches, dataset, steps.__getitem__, len(steps))) as batches:
                for number, indices in enumerate(steps):
                    of = f"batch {number + 1} of {len(steps)} of the reference ({name})"
                    with watched(of, self.config.trainer.step_timeout):
                        values[indices] = self.sums(batches.get(number)).cpu().numpy()
                    bar.update(len(indices))
        return values

    def _keep(self, entry: Path, key: ReferenceKey, values: np.ndarray) -> None:
        cached_directory(
            entry.parent,
            entry.name,
            lambda directory: write_entry(directory, key, values),
            usable=lambda directory: read_entry(directory, key, *values.shape) is not None,
        )


def write_entry(directory: Path, key: ReferenceKey, values: np.ndarray) -> None:
    """Write ``[pairs, 4]`` or ``[answers, 1]`` values and what they belong to."""
    path = directory / LOGPS_FILE
    np.save(path, values, allow_pickle=False)
    meta = {**asdict(key), "pairs": len(values), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (directory / META_FILE).write_text(json.dumps(meta, indent=1))


def read_entry(directory: Path, key: ReferenceKey, pairs: int, columns: int = len(SUMS)) -> np.ndarray | None:
    """The values of a cache entry ``[pairs, columns]``; None if it is absent, damaged, or of something else."""
    path = directory / LOGPS_FILE
    try:
        meta = json.loads((directory / META_FILE).read_text())
        if hashlib.sha256(path.read_bytes()).hexdigest() != meta.pop("sha256"):
            return None
        if meta != {**asdict(key), "pairs": pairs}:
            return None
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    usable = values.shape == (pairs, columns) and np.isfinite(values).all()
    return values if usable else None


def reference_in_memory(policy: Policy, base: StartModel) -> Callable[[StepBatch], None] | None:
    """What gives batches their reference values, where the run wants a reference model beside the policy.

    That is a frozen second model, or the policy itself with its adapters off.
    """
    config = policy.config
    if not (config.model.reference_in_memory and policy.loss.needs_reference):
        return None
    if config.model.peft.name is not None:
        adapted, sums = policy.models, ResponseSums(policy)

        def attach(batch: StepBatch) -> None:
            with adapters_off(adapted):
                sums.attach(batch)

        return attach
    return ResponseSums(policy, load_reference(policy, reference_model(config, base))).attach


def reference_model(config: Config, base: StartModel) -> StartModel:
    """The frozen model that a run compares with: what `model.reference_from_path` names, or the start.

    Raises:
        ConfigError: it is another architecture than the policy's.
        CheckpointError: there is no model.
    """
    named = config.model.reference_from_path
    if named is None:
        return base
    try:
        found = find_start_model(replace(config.model, restore_from_path=named, architecture=None))
    except CheckpointError as error:
        raise CheckpointError(str(error).replace("restore_from_path", "reference_from_path", 1)) from None
    if found.architecture != base.architecture:
        raise ConfigError(
            f"model.reference_from_path={named} has another architecture than the model that is trained; give the one "
            "that it was trained from"
        )
    return found


def load_reference(policy: Policy, reference: StartModel) -> list[torch.nn.Module]:
    """A second model that lies as the policy's own, frozen, with the reference's weights."""
    chunks = build_frozen_chunks(policy)
    load_start_weights(chunks, policy.groups, reference, policy.config.model.seed)
    return chunks


def attach_reference_logps(data: LoadedData, policy: Policy, base: StartModel, batches: BatchBuilder) -> None:
    """Give all examples their reference values, by the policy itself while it still has the start weights.

    Communicates: the layout's own, and a broadcast over all ranks.
    """
    reference = ReferenceLogps(policy, base, data.tokenizer, batches)
    for name, dataset in (("train", data.train), ("validation", data.validation)):
        if dataset is not None:
            reference.attach(dataset, name)
            if dataset.mismatched is not None:
                reference.attach(dataset.mismatched, f"mismatched {name}")
