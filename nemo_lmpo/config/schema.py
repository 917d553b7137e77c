"""The configuration of a run: dataclasses that hold the only defaults.

Recipes (YAML) hold what differs from these; :mod:`nemo_lmpo.config.recipe` composes and checks them. Names follow
NeMo where NeMo has one. This module imports nothing of the package, so every command can read it fast.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    """The policy and how it is laid out over processes."""

    restore_from_path: str | None = None
    """Starting weights: a Hugging Face directory or hub name, a `.nemo` file, or a checkpoint of this project."""
    architecture: dict[str, Any] | None = None
    """A Hugging Face style config (`model_type`, `hidden_size`, ...) for a model with random weights; beside
    `restore_from_path`, what is expected there."""
    tokenizer: str | None = None
    """Tokenizer directory, hub name, or `builtin:NAME`; unset: the one beside the starting weights."""
    trust_remote_code: bool = False
    """Whether code that comes with a model or tokenizer may run."""
    global_batch_size: int = 128
    """Preference pairs of one optimizer step, over all processes."""
    micro_batch_size: int | None = None
    """At most this many pairs in one packed row; unset: as many as fit `data.row_tokens`; 1: unpacked."""
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline stage (interleaved schedule)."""
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    """Split the activations outside attention and MLP along the sequence over the tensor-parallel group."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""
    transformer_engine: bool | None = None
    """Transformer Engine layers; unset: where there is a GPU and megatron-core can use the installed version."""
    attention_backend: str = "auto"
    """`flash` (torch's variable-length kernel: A100 or newer, bf16), `te` (Transformer Engine's: H100, or A100 with
    flash-attn; bf16), `sdpa` (torch, a call a span, runs everywhere), or `auto`: the first of these that runs."""
    activations_checkpoint_granularity: str | None = None
    """Recompute activations in backward: unset, `selective` (attention) or `full` (whole layers)."""
    activations_checkpoint_method: str = "uniform"
    """For `full`: `uniform` or `block`."""
    activations_checkpoint_num_layers: int = 1
    """For `full`: layers a recomputed unit (`uniform`), or recomputed layers a stage (`block`)."""
    logprob_chunk_tokens: int = 1024
    """Predicting positions whose logits exist at a time."""
    reference_in_memory: bool = False
    """Keep the reference model of DPO, IPO or KTO in memory, instead of computing its log-probabilities before."""
    seed: int = 42
    """Random start weights and the order of the data."""


@dataclass
class DatasetConfig:
    """Where preference pairs come from."""

    path: Any = None
    """A file (JSONL, JSONL.gz, Parquet), a directory saved by `datasets`, a hub name, `builtin:NAME`, or a list."""
    split: str = "train"
    """Split of hub datasets, saved dataset dictionaries and builtin tasks."""
    weights: list[float] | None = None
    """One a path: the fraction of it that an epoch holds (1: all, 0.5: half, 2: twice)."""
    schema: str = "auto"
    """`auto`, `messages` (UltraFeedback-binarized), `strings` (prompt/chosen/rejected) or `hh` (Anthropic HH)."""
    limit: int | None = None
    """Use the first N rows of each path."""


@dataclass
class DataConfig:
    """Preference pairs: reading, templating, truncating, packing."""

    train: DatasetConfig = field(default_factory=DatasetConfig)
    validation: DatasetConfig = field(default_factory=lambda: DatasetConfig(split="test"))
    max_length: int = 2048
    """Tokens of prompt and response together; responses are cut at the end."""
    max_prompt_length: int = 1800
    """Tokens of the prompt; longer ones keep their end."""
    chat_template: str | None = None
    """Unset: the tokenizer's; else a file, or a built-in name (`chatml`, `llama3`, `mistral`, `zephyr`, `plain`)."""
    system_prompt: str | None = None
    """A system message put in front of conversations that have none."""
    on_bad_row: str = "error"
    """`error` stops at the first unusable row; `skip` counts and drops it."""
    share_prompt: bool = True
    """Lay a pair's prompt in the row once for both responses; the numbers are the same either way."""
    row_tokens: int | None = None
    """Token budget of a packed row; unset: two full-length sequences, see :attr:`row_budget`."""
    cache_dir: str | None = None
    """Where tokenized pairs are kept; unset: `$XDG_CACHE_HOME/nemo_lmpo` or `~/.cache/nemo_lmpo`."""
    num_workers: int | None = None
    """Processes that tokenize; unset: one for small data, else the number of CPU cores."""

    @property
    def row_budget(self) -> int:
        """Most tokens of a packed row: `row_tokens`, or two sequences of `max_length`."""
        return self.row_tokens or 2 * self.max_length


@dataclass
class ScheduleConfig:
    """Learning-rate schedule over the run's steps."""

    name: str = "cosine"
    """`cosine`, `linear` or `constant`, each after the warm-up."""
    warmup_fraction: float = 0.1
    """Part of all steps during which the rate rises linearly from 0."""
    min_lr: float = 0.0
    """The rate at the end."""


@dataclass
class OptimConfig:
    """AdamW through megatron-core."""

    lr: float = 1e-6
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    use_distributed_optimizer: bool = False
    """Shard optimizer state over the data-parallel group."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while backward still runs."""
    sched: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class TrainerConfig:
    """How long and how to train."""

    max_epochs: int = 1
    """Passes over the pairs; `max_steps` overrides."""
    max_steps: int | None = None
    """Optimizer steps of the whole run; unset: `max_epochs` passes."""
    devices: int = 1
    """Processes a node that a recipe is laid out for; launchers and the dry run use it, a run counts its own."""
    num_nodes: int = 1
    precision: str = "bf16"
    """`bf16` (BF16 compute, float32 main parameters) or `32`."""
    gradient_clip_val: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    val_check_interval: int = 400
    """Steps between validations; 0: only at the end."""
    max_time_per_run: str | None = None
    """`DD:HH:MM:SS` (NeMo's form) or `HH:MM:SS`: save and exit 0 before this much time has passed."""
    num_threads: int | None = None
    """CPU threads a process; unset: the cores shared equally by the node's processes."""


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    save_interval: int = 100
    """Steps between checkpoints; one is always saved at the end; 0: only then."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_best: int = 1
    """Best checkpoints kept besides."""
    monitor: str = "val/loss"
    """Metric that ranks checkpoints."""
    mode: str = "min"
    """`min` or `max`: which end of `monitor` is best."""
    async_save: bool = False
    """Write while training goes on, where the backend can."""
    resume: bool = True
    """Go on from the newest good checkpoint of the run directory."""


@dataclass
class WandbConfig:
    """Weights & Biases; off unless `project` is set."""

    project: str | None = None
    name: str | None = None
    entity: str | None = None


@dataclass
class LoggingConfig:
    """What is shown and kept besides `metrics.jsonl`."""

    tensorboard: bool = True
    progress_bar: bool = True
    log_interval: int = 1
    """Steps between lines of TensorBoard, W&B and the progress bar (`metrics.jsonl` has every step)."""
    report: bool = True
    """Draw `report.html` at the end."""
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass
class Config:
    """One run."""

    name: str = "run"
    """The recipe's name."""
    run_dir: str | None = None
    """Everything the run writes; unset: `runs/<name>` under the working directory."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: Any = None
    """The dataclass of the chosen loss (see :mod:`nemo_lmpo.loss.registry`)."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    dry_run: bool = False
    """Validate, print the layout and the memory expected, and exit."""
    traceback: bool = False
    """Show the full traceback of errors that are otherwise one message."""
