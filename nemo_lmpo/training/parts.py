"""A policy at its start, the steps that it trains on, and its files: of a session as of the NeMo plugin."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from nemo_lmpo.checkpoint.agreement import on_main_rank
from nemo_lmpo.checkpoint.run_directory import RunDirectory
from nemo_lmpo.checkpoint.weights import describe_weights, sharded_weights
from nemo_lmpo.checkpoint.writers import write_state
from nemo_lmpo.config.schema import Config
from nemo_lmpo.data.example import ANSWERS
from nemo_lmpo.data.mismatched import MismatchedAnswers, partners
from nemo_lmpo.data.order import PairSampler, epoch_order
from nemo_lmpo.data.tokenizer import padding_id
from nemo_lmpo.formats.adapters import AdapterDescription, adapter_json
from nemo_lmpo.formats.conversion import plan, write_nemo
from nemo_lmpo.formats.fingerprint import weights_fingerprint
from nemo_lmpo.formats.lora_targets import projections_of
from nemo_lmpo.formats.model_files import EMBEDDED_FOLDER, open_model
from nemo_lmpo.formats.start_model import StartModel
from nemo_lmpo.monitor.watchdog import watched
from nemo_lmpo.parallel.groups import ParallelGroups
from nemo_lmpo.runtime import run_files
from nemo_lmpo.runtime.chat_record import ChatRecord
from nemo_lmpo.runtime.files import replace_file
from nemo_lmpo.training.batches import BatchBuilder, StepBatch
from nemo_lmpo.training.policy import Policy, kernels_for
from nemo_lmpo.training.reference import attach_reference_logps, reference_in_memory
from nemo_lmpo.training.start import LoadedData, load_start_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def start_policy(config: Config, base: StartModel, groups: ParallelGroups, device: torch.device) -> Policy:
    """A policy with its start weights, and with a reference model beside it where the run wants one.

    Raises:
        CheckpointError: the start model cannot be read.
    """
    kernels = kernels_for(config, base.architecture, use_cuda=device.type == "cuda")
    policy = Policy(config, base.architecture, groups, device, kernels)
    with watched("loading the start model", config.trainer.step_timeout):
        policy.attach_reference = reference_in_memory(policy, base)
        load_start_weights(policy.models, groups, base, config.model.seed)
    return policy


class StepBatches:
    """The training steps in order, built as they are asked for; what NeMo calls a dataloader."""

    def __init__(self, policy: Policy, base: StartModel, data: LoadedData) -> None:
        """Give the pairs reference values where the loss needs them.

        Args:
            policy: must still hold the start weights.
            base: what it started from.
            data: its pairs.
        """
        config = policy.config
        self.data = data
        self.sampler = PairSampler(len(data.train), config.model.global_batch_size, config.model.seed)
        self.builder = BatchBuilder(
            config,
            policy.groups,
            device=policy.device,
            pad_id=padding_id(data.tokenizer),
            sliding_window=base.architecture.sliding_window,
            mixture=base.architecture.experts is not None,
        )
        if policy.loss.needs_mismatched:
            self._add_mismatched(config)
        if policy.loss.needs_reference and policy.attach_reference is None:
            attach_reference_logps(data, policy, base, self.builder)
        self._steps = config.trainer.max_steps or config.trainer.max_epochs * self.sampler.steps_per_epoch

    def _add_mismatched(self, config: Config) -> None:
        """Give answers their mismatched ones, as the batches of the first epoch and of validation have them."""
        size = config.model.global_batch_size
        for dataset in (self.data.train, self.data.validation):
            if dataset is None or dataset.kind != ANSWERS:
                continue
            number = len(dataset)
            order = epoch_order(number, config.model.seed, 0) if dataset is self.data.train else np.arange(number)
            dataset.mismatched = MismatchedAnswers(
                dataset,
                partners(order, size),
                max_length=config.data.max_length,
                row_tokens=config.data.row_budget,
            )

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[StepBatch]:
        for step in range(len(self)):
            yield self.builder.build(self.data.train, self.sampler.pairs_of_step(step))


class PolicyFiles:
    """What is written of a policy besides its state in checkpoints."""

    def __init__(
        self,
        policy: Policy,
        base: StartModel,
        run: RunDirectory,
        tokenizer: PreTrainedTokenizerBase,
        chat: ChatRecord | None,
    ) -> None:
        """Describe the adapters and their base, where the policy trains some; all ranks call it together."""
        self.policy, self.base, self.run, self.tokenizer, self.chat = policy, base, run, tokenizer, chat
        self.adapters = None
        model = policy.config.model
        if model.peft.name is not None:
            with watched("reading the start model", policy.config.trainer.step_timeout):
                fingerprint: str = on_main_rank(lambda: weights_fingerprint(base.path, base.architecture, model.seed))
            path = None if base.path is None else str(base.path.resolve())
            self.adapters = AdapterDescription(
                rank=model.peft.rank,
                alpha=model.peft.alpha,
                dropout=model.peft.dropout,
                projections=projections_of(model.peft.target_modules),
                base=path,
                seed=model.seed,
                fingerprint=fingerprint,
            )

    def write_sidecars(self, directory: Path) -> None:
        """Configuration, architecture, tokenizer and chat template, which belong to the policy's weights (rank 0)."""
        self.run.write_sidecars(directory, self.base, self.tokenizer, self.chat)
        if self.adapters is not None:
            replace_file(directory / run_files.ADAPTER, adapter_json(self.adapters))

    def save_to(self, save_path: str | Path) -> None:
        """Write the policy as a `.nemo`, or as the same tree if the name does not end so; an existing one is replaced.

        All ranks call it together: each writes its part beside the archive, from where rank 0 converts the whole.

        Args:
            save_path: the same on all ranks, on storage that they share.

        Raises:
            CheckpointError: no room on the disk, or ``save_path`` is in the way of something.
            OSError: it could not be written; what was there is untouched.
        """
        output = Path(save_path).expanduser().resolve()
        parts = output.with_name(f"{output.name}.parts")
        model = self.policy.config.model
        # By this name NeMo shall load a tokenizer that a `.nemo` cannot hold in NeMo's own way.
        named = model.tokenizer or model.restore_from_path
        tokenizer = EMBEDDED_FOLDER if named is None or self.base.added_ids else named

        def prepare() -> None:
            shutil.rmtree(parts, ignore_errors=True)
            (parts / run_files.STATE).mkdir(parents=True)

        def convert() -> None:
            self.write_sidecars(parts)
            conversion = plan(open_model(parts), output)
            conversion.check([], overwrite=True)
            write_nemo(conversion, hub_name=tokenizer, overwrite=True)

        with watched(f"writing {output}", self.policy.config.trainer.step_timeout):
            on_main_rank(prepare)
            try:
                weights = sharded_weights(describe_weights(self.policy.whole_models()))
                write_state(weights, parts / run_files.STATE)
                on_main_rank(convert)
            finally:
                on_main_rank(lambda: shutil.rmtree(parts, ignore_errors=True))
