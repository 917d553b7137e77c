"""The NeMo plugin class: a policy that can be trained on preference pairs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from nemo.core.classes import ModelPT
from omegaconf import DictConfig, OmegaConf

from nemo_lmpo.checkpoint.export import write_policy_archive
from nemo_lmpo.config.architecture import Architecture, architecture_to_hf
from nemo_lmpo.config.schema import Config
from nemo_lmpo.errors import UserError
from nemo_lmpo.formats.model_files import TRAINING_CONFIG
from nemo_lmpo.loss.registry import build_loss
from nemo_lmpo.loss.running_statistics import RunningStatistics
from nemo_lmpo.model.build import build_model_chunks, parameter_dtype
from nemo_lmpo.model.kernels import Kernels, choose_kernels, this_device
from nemo_lmpo.model.packed_gpt import PackedGPTModel
from nemo_lmpo.parallel.groups import ParallelGroups
from nemo_lmpo.training.batches import MicroBatch, StepBatch
from nemo_lmpo.training.optimizer import wrap_data_parallel
from nemo_lmpo.training.pair_metrics import OBSERVED, PairMetrics
from nemo_lmpo.training.step import MicroBatchStep

if TYPE_CHECKING:
    from nemo_lmpo.training.reference import FrozenReference


def nemo_config(config: Config) -> DictConfig:
    """The run's configuration in NeMo's form: the model's fields at the top, the other groups below."""
    groups = asdict(config)
    model = groups.pop("model")
    return OmegaConf.create({**model, **groups})


class MegatronGPTLMPOModel(ModelPT):
    """A megatron-core policy with a preference loss, in the shape of NeMo-Aligner's model classes.

    A trainer calls, for each step, :meth:`prepare_for_training_step`, :meth:`get_loss_and_metrics` and
    :meth:`finish_training_step`, then clips and steps the optimizer.
    """

    def __init__(
        self,
        cfg: DictConfig,
        trainer: Trainer | None = None,
        *,
        config: Config,
        architecture: Architecture,
        groups: ParallelGroups,
        device: torch.device,
    ) -> None:
        super().__init__(cfg=cfg, trainer=trainer)
        self.config = config
        self.architecture = architecture
        self.groups = groups
        self.target_device = device
        self.dtype_of_parameters = parameter_dtype(config.trainer)
        self.kernels: Kernels = choose_kernels(
            config.model,
            precision=config.trainer.precision,
            head_dim=architecture.head_dim,
            device=this_device(use_cuda=device.type == "cuda"),
        )
        self.loss = build_loss(config.loss)
        statistics = self.loss.statistics
        self.statistics = RunningStatistics(statistics) if statistics is not None else None
        chunks = build_model_chunks(
            architecture,
            config.model,
            groups=groups,
            dtype=self.dtype_of_parameters,
            device=device,
            kernels=self.kernels,
        )
        self.chunks = torch.nn.ModuleList(wrap_data_parallel(chunks, config.optim))
        self.reference: FrozenReference | None = None
        """Set where `model.reference_in_memory` is."""
        self.write_sidecars: Callable[[Path], None] = self._write_architecture
        """Writes what belongs to the weights into a directory; a session adds its tokenizer."""
        self.micro_batch_step = MicroBatchStep(
            self.loss, self.statistics, groups, chunk_tokens=config.model.logprob_chunk_tokens, device=device
        )

    @property
    def policy(self) -> list[PackedGPTModel]:
        """The model chunks of this process without wrappers."""
        from megatron.core.utils import unwrap_model

        return cast(list[PackedGPTModel], unwrap_model(list(self.chunks)))

    def num_local_parameters(self) -> int:
        """Parameters that this process holds."""
        return sum(parameter.numel() for chunk in self.policy for parameter in chunk.parameters())

    def prepare_for_training_step(self) -> None:
        """Clear the gradient buffers."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]

    def get_loss_and_metrics(self, batch: StepBatch, forward_only: bool) -> tuple[float, dict[str, float]]:
        """Mean loss over the global batch and its metrics, the same on every rank.

        With ``forward_only=False`` gradients are left in the buffers, and statistics that a loss updates after
        the step are updated.
        """
        table = self.run_batch(batch, forward_only=forward_only)
        metrics = table.metrics()
        if self.statistics is not None and self.loss.name == "lmpo":
            current = self.statistics.current()
            metrics["lmpo/mean"], metrics["lmpo/std"] = current.mean, current.std
        if not forward_only:
            self._update_after_step(table)
        return metrics["loss"], metrics

    def run_batch(self, batch: StepBatch, *, forward_only: bool) -> PairMetrics:
        """Forward (and backward) over the rows; the per-pair values of the whole global batch.

        Communicates: whatever the layout's schedule does, then the sharing of the table.
        """
        if self.reference is not None:
            self.reference.attach(batch)
        if self.statistics is not None and self.statistics.config.update == "before_step":
            self._observe_batch(batch)
        self.micro_batch_step.begin(batch.num_pairs, training=not forward_only)
        self.run_pipeline(batch.rows, forward_only=forward_only)
        self.micro_batch_step.table.share(self.groups)
        self._share_statistics()
        return self.micro_batch_step.table

    def _observe_batch(self, batch: StepBatch) -> None:
        """Take the global batch's statistic in a forward pass of its own, before the losses that need it."""
        assert self.statistics is not None
        self.micro_batch_step.begin(batch.num_pairs, training=False)
        self.run_pipeline(batch.rows, forward_only=True)
        self.micro_batch_step.table.share(self.groups)
        self.statistics.update(self.micro_batch_step.table.column(OBSERVED))

    def run_pipeline(
        self,
        rows: list[MicroBatch],
        *,
        forward_only: bool,
        micro_batch_step: MicroBatchStep | None = None,
        chunks: list[Any] | None = None,
    ) -> None:
        """Send rows through the pipeline.

        Args:
            rows: this rank's rows.
            forward_only: without gradients.
            micro_batch_step: what to do with each row; the policy's loss by default.
            chunks: other model chunks of the same layout than the policy's.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        model = list(self.chunks) if chunks is None else chunks
        iterators: list[Iterator[MicroBatch]] = [iter(rows) for _ in model]
        context: AbstractContextManager[Any] = torch.no_grad() if forward_only else nullcontext()
        for chunk in model:
            chunk.train(not forward_only)
        with context:
            get_forward_backward_func()(
                forward_step_func=(micro_batch_step or self.micro_batch_step).forward_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=model,
                num_microbatches=len(rows),
                # Rows bring their own length; megatron-core ignores this one.
                seq_length=max(row.input_ids.numel() for row in rows),
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def _update_after_step(self, table: PairMetrics) -> None:
        if self.statistics is not None and self.statistics.config.update == "after_step":
            self.statistics.update(table.column(OBSERVED))

    def _share_statistics(self) -> None:
        """Bring statistics that only last stages updated to all stages; one broadcast over the pipeline."""
        if self.statistics is None or self.groups.pipeline.size() == 1:
            return
        if self.statistics.config.update != "before_micro_batch":
            return
        state = [self.statistics.state_dict()]
        dist.broadcast_object_list(state, self.groups.last_stage_rank, group=self.groups.pipeline)
        self.statistics.load_state_dict(state[0])

    def finish_training_step(self) -> None:
        """Sum gradients over all ranks that share weights.

        Communicates over the data- and context-parallel group, over the tensor-parallel group for the norms
        under sequence parallelism, and over first and last stage for tied embeddings.
        """
        from megatron.core.distributed import finalize_model_grads

        # Losses were divided by the global number of pairs already, so no token count is given.
        finalize_model_grads(list(self.chunks))

    def _write_architecture(self, directory: Path) -> None:
        (directory / TRAINING_CONFIG).write_text(json.dumps(architecture_to_hf(self.architecture), indent=1))

    def save_to(self, save_path: str | Path) -> None:
        """Write the policy as a `.nemo` that NeMo-Aligner and the converters read; all ranks call it together.

        Args:
            save_path: an existing file is replaced once the new one is complete.

        Raises:
            CheckpointError: no room on the disk.
        """
        model = self.config.model
        write_policy_archive(
            Path(save_path).expanduser().resolve(),
            self.policy,
            self.write_sidecars,
            tokenizer=model.tokenizer or model.restore_from_path,
        )

    @classmethod
    def restore_from(cls, restore_path: str | Path, *args: object, **kwargs: object) -> MegatronGPTLMPOModel:
        """NeMo's way to load a model; a policy needs its layout first.

        Raises:
            UserError: always, with the way that works.
        """
        raise UserError(
            f"a policy is not restored from '{restore_path}' alone, since its layout is not known; "
            f"train with model.restore_from_path={restore_path}"
        )

    @classmethod
    def list_available_models(cls) -> None:
        """NeMo's catalogue of downloadable models; there is none for policies."""

    def setup_training_data(self, train_data_config: object) -> None:
        """Part of NeMo's interface; batches come from the trainer."""

    def setup_validation_data(self, val_data_config: object) -> None:
        """Part of NeMo's interface; batches come from the trainer."""
