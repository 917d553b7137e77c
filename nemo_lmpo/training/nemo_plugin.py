"""The NeMo plugin class: a thin adapter that gives a policy NeMo's and NeMo-Aligner's methods."""

from __future__ import annotations

import atexit
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from nemo.core.classes import ModelPT
from omegaconf import DictConfig, OmegaConf

from nemo_lmpo.checkpoint.run_directory import RunDirectory
from nemo_lmpo.config.loss_section import parse_loss
from nemo_lmpo.config.mode import MODE_WORDS
from nemo_lmpo.config.recipe import config_from_mapping
from nemo_lmpo.config.rules import validate
from nemo_lmpo.config.schema import Config
from nemo_lmpo.data.preference import pair_encoder
from nemo_lmpo.data.tokenizer import load_tokenizer
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.loss.options import DEFAULT_LOSS
from nemo_lmpo.parallel.groups import ParallelGroups, create_groups
from nemo_lmpo.runtime.launch import read_launch_info
from nemo_lmpo.training.added_tokens import with_added_tokens
from nemo_lmpo.training.batches import StepBatch
from nemo_lmpo.training.optimizer import build_optimizer, build_scheduler
from nemo_lmpo.training.parts import PolicyFiles, StepBatches, start_policy
from nemo_lmpo.training.process import distributed_session, prepare_device
from nemo_lmpo.training.start import load_data
from nemo_lmpo.training.start_model import find_start_model

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def nemo_config(config: Config) -> DictConfig:
    """A run's configuration in NeMo's form: the model's fields at the top, the other groups below."""
    groups = asdict(config)
    model = groups.pop("model")
    return OmegaConf.create({**model, **groups})


def config_from_nemo(cfg: DictConfig) -> Config:
    """The run's configuration from NeMo's form.

    Raises:
        ConfigError: an unknown key or a value of the wrong type.
    """
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    # The words of a mode stand in configurations of earlier versions.
    other = {*(name for name in asdict(Config()) if name != "model"), *MODE_WORDS}
    groups = {name: value for name, value in plain.items() if name in other}
    # NeMo writes where a model was restored from and which class it is into its configuration.
    model = {name: value for name, value in plain.items() if name not in other | {"target", "nemo_version"}}
    return config_from_mapping({**groups, "model": model})


class MegatronGPTLMPOModel(ModelPT):
    """A policy in the shape of NeMo-Aligner's model classes.

    A trainer calls, for each step, :meth:`prepare_for_training_step`, :meth:`get_loss_and_metrics` and
    :meth:`finish_training_step`, then steps the optimizer, which clips, and the schedule; both come from
    :meth:`setup_optimization`, the batches from :meth:`setup_training_data`.

    The layout is the one that megatron-core's groups have; where there are none yet, the constructor joins the job
    (a single process without a launcher) in the layout of ``cfg`` and leaves it at exit.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        """Build the policy and load its start weights.

        Args:
            cfg: see :func:`nemo_config`.
            trainer: kept for NeMo; nothing here needs one.

        Raises:
            UserError: the settings cannot be used, or the start model cannot be read.
        """
        super().__init__(cfg=cfg, trainer=trainer)
        config = config_from_nemo(cfg)
        groups, device = _present_layout(config)
        self.base = with_added_tokens(
            find_start_model(config.model),
            config.data.add_special_tokens,
            trust_remote_code=config.model.trust_remote_code,
        )
        validate(config, self.base.architecture, dist.get_world_size())
        self.policy = start_policy(config, self.base, groups, device)
        self.chunks = self.policy.chunks  # registered, so that NeMo sees the parameters

    def prepare_for_training_step(self) -> None:
        """Clear the gradient buffers."""
        self.policy.prepare_for_training_step()
        if self._optimizer is not None:
            # Without main parameters the optimizer leaves the buffer's gradients on the parameters, where backward
            # would add to them a second time.
            self._optimizer.zero_grad()

    def get_loss_and_metrics(self, batch: StepBatch, forward_only: bool) -> tuple[float, dict[str, float]]:
        """Mean loss over the global batch and its metrics, the same on every rank.

        With ``forward_only=False`` gradients are left in the buffers. Communicates as the layout's schedule does.
        """
        outcome = self.policy.get_loss_and_metrics(batch, forward_only=forward_only)
        return outcome.loss, outcome.metrics

    def finish_training_step(self) -> None:
        """Sum gradients over all ranks that share weights."""
        self.policy.finish_training_step()

    def setup_training_data(self, train_data_config: object) -> None:
        """Make the steps of the configuration's `data.train` the training data (NeMo's argument is not read)."""
        self._train_dl = StepBatches(self.policy, self.base, load_data(self.policy.config, self.base))

    def setup_validation_data(self, val_data_config: object) -> None:
        """Part of NeMo's interface; :meth:`setup_training_data` reads the validation pairs too (`data.validation`)."""

    def setup_optimization(self, *_: object, **__: object) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
        """megatron-core's optimizer, whose ``step`` clips to `trainer.gradient_clip_val`, and the schedule.

        Raises:
            ConfigError: neither `trainer.max_steps` nor training data says how long the schedule is.
        """
        config = self.policy.config
        steps = config.trainer.max_steps or (len(self._train_dl) if self._train_dl is not None else None)
        if steps is None:
            raise ConfigError("trainer.max_steps is not set; set it, or call setup_training_data before")
        self._optimizer = build_optimizer(self.policy.chunks, config)
        self._scheduler = build_scheduler(self._optimizer, config.optim, steps)
        return self._optimizer, self._scheduler

    def configure_optimizers(self) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
        """The same under Lightning's name."""
        return self.setup_optimization()

    def save_to(self, save_path: str | Path) -> None:
        """Write the policy as a `.nemo` that NeMo-Aligner and the converters read; all ranks call it together.

        Args:
            save_path: an existing file is replaced once the new one is complete.

        Raises:
            CheckpointError: no room on the disk.
        """
        config = self.policy.config
        tokenizer = load_tokenizer(self.base.tokenizer, trust_remote_code=config.model.trust_remote_code)
        run = RunDirectory(config)
        # A model that no conversation can be put to may be saved as well.
        has_template = config.data.chat_template is not None or tokenizer.chat_template is not None
        chat = pair_encoder(config.data, tokenizer).record() if has_template else None
        PolicyFiles(self.policy, self.base, run, tokenizer, chat).save_to(save_path)

    @classmethod
    def restore_from(
        cls,
        restore_path: str | Path,
        override_config_path: DictConfig | str | Path | None = None,
        *,
        trainer: Trainer | None = None,
        return_config: bool = False,
        **settings: Any,
    ) -> MegatronGPTLMPOModel | DictConfig:
        """A policy with the weights of ``restore_path``, in the layout that ``override_config_path`` says.

        Args:
            restore_path: a `.nemo`, or any other form of a model that training starts from.
            override_config_path: NeMo's form of a configuration (:func:`nemo_config`), or a YAML file of it; unset:
                the defaults, in one process.
            trainer: kept for NeMo.
            return_config: give the configuration instead of the model.
            **settings: NeMo's other arguments (`strict`, `map_location`, ...), which change nothing here: weights
                are always checked, and go where the layout says.

        Raises:
            UserError: the path is not a model that this project reads.
        """
        if override_config_path is None:
            cfg = nemo_config(_defaults_for(str(restore_path)))
        elif isinstance(override_config_path, DictConfig):
            cfg = override_config_path.copy()
        else:
            cfg = cast(DictConfig, OmegaConf.load(override_config_path))
        OmegaConf.update(cfg, "restore_from_path", str(restore_path), force_add=True)
        return cfg if return_config else cls(cfg, trainer)

    @classmethod
    def list_available_models(cls) -> None:
        """NeMo's catalogue of downloadable models; there is none for policies."""


def _defaults_for(restore_path: str) -> Config:
    """The defaults, with lengths within the model's positions."""
    config = Config(loss=parse_loss({"name": DEFAULT_LOSS}))
    config.model.restore_from_path = restore_path
    positions = find_start_model(config.model).architecture.max_position_embeddings
    config.data.max_length = min(config.data.max_length, positions)
    config.data.max_prompt_length = min(config.data.max_prompt_length, positions - 1)
    return config


def _present_layout(config: Config) -> tuple[ParallelGroups, torch.device]:
    """The groups that are there, whose sizes ``config`` takes over; else those that it asks for."""
    launch = read_launch_info()
    if not dist.is_initialized():
        stack = ExitStack()
        atexit.register(stack.close)
        return stack.enter_context(distributed_session(config, launch))
    device = prepare_device(config, launch)
    groups = create_groups(config.model, timeout_minutes=config.trainer.distributed_timeout)
    config.model.tensor_model_parallel_size = groups.tensor.size()
    config.model.pipeline_model_parallel_size = groups.pipeline.size()
    config.model.context_parallel_size = groups.context.size()
    return groups, device
