"""The configuration of a run: dataclasses that hold the only defaults.

Recipes (YAML) hold what differs from these; :mod:`nemo_lmpo.config.recipe` composes them and
:mod:`nemo_lmpo.config.coerce` checks names, types, choices and bounds. What a number may be, and whether a resumed run
may have another value than before, stands at the field (:func:`nemo_lmpo.settings.setting`); rules that look at several
fields are in :mod:`nemo_lmpo.config.rules`. Names follow NeMo where NeMo has one. This module imports nothing heavy, so
every command can read it fast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from nemo_lmpo.config.coerce import types_of
from nemo_lmpo.settings import setting


@dataclass
class PeftConfig:
    """Adapters instead of full training; off unless `name` is set."""

    name: Literal["lora"] | None = setting(None, switch=True)
    """`lora`: the base is frozen, checkpoints hold the adapters only."""
    rank: int = setting(32, minimum=1, maximum=4096)
    alpha: float = setting(32.0, above=0, maximum=1e6)
    """Adapters are scaled by `alpha / rank`."""
    dropout: float = setting(0.0, minimum=0, below=1)
    """Of the adapters' inputs, in training."""
    target_modules: list[str] = setting(["all-linear"])
    """PEFT's names (`q_proj`, ..., `down_proj`, `all-linear`), or NeMo's for fused layers (`linear_qkv`, ...), which
    stand for the projections in them, each with adapters of its own."""


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
    global_batch_size: int = setting(128, minimum=1)
    """Preference pairs of one optimizer step, over all processes."""
    micro_batch_size: int | None = setting(None, may_change=True, minimum=1, remedy="unset it for no limit")
    """At most this many pairs in one packed row; unset: as many as fit `data.row_tokens`; 1: unpacked."""
    tensor_model_parallel_size: int = setting(1, may_change=True, minimum=1)
    pipeline_model_parallel_size: int = setting(1, may_change=True, minimum=1)
    virtual_pipeline_model_parallel_size: int | None = setting(
        None, may_change=True, minimum=2, remedy="unset it for one chunk a stage"
    )
    """Model chunks per pipeline stage (interleaved schedule)."""
    account_for_embedding_in_pipeline_split: bool = setting(False, may_change=True)
    """Give the first stage a layer less than the others: the embedding counts as one."""
    account_for_loss_in_pipeline_split: bool = setting(False, may_change=True)
    """Give the last stage a layer less than the others: log-probabilities and loss count as one."""
    context_parallel_size: int = setting(1, may_change=True, minimum=1)
    sequence_parallel: bool = setting(False, may_change=True)
    """Split the activations outside attention and MLP along the sequence over the tensor-parallel group."""
    expert_model_parallel_size: int = setting(1, may_change=True, minimum=1)
    """Ranks over which the experts of a layer lie (EP): ranks of tensor-, context- and data parallelism."""
    expert_tensor_parallel_size: int = setting(1, may_change=True, minimum=1)
    """Ranks over which each expert is cut, in place of `tensor_model_parallel_size`."""
    moe_aux_loss: Literal["global_batch", "sequence"] | None = None
    """Balance experts by a term of the loss, over the tokens of the `global_batch` (for which they are counted in a
    forward pass before, unless the loss has one) or of each `sequence`; unset: not at all, as is usual for
    preferences."""
    moe_aux_loss_coefficient: float = setting(1e-3, above=0, maximum=1)
    """What the term, which is 1 in a layer whose experts get equally much, is multiplied by."""
    moe_freeze_router: bool = False
    """Train everything but the routers of experts."""
    fsdp: bool = setting(False, may_change=True)
    """Share weights, gradients and optimizer state over the data- and context-parallel ranks, which gather a layer
    while it runs (FSDP). `optim.use_distributed_optimizer` and `optim.overlap_grad_reduce` are part of it."""
    make_vocab_size_divisible_by: int = setting(128, may_change=True, minimum=1, maximum=65536)
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""
    transformer_engine: bool | None = setting(None, may_change=True)
    """Transformer Engine layers; unset: where there is a GPU and megatron-core can use the installed version."""
    attention_backend: Literal["auto", "flash", "te", "sdpa"] = setting("auto", may_change=True)
    """`flash` (torch's variable-length kernel: A100 or newer, bf16), `te` (Transformer Engine's: H100, or A100 with
    flash-attn; bf16), `sdpa` (torch, a call a span, runs everywhere), or `auto`: the first of these that runs."""
    fp8: Literal["hybrid", "tensorwise", "blockwise"] | None = None
    """Matrix products of layers in FP8 (Transformer Engine, H100 or newer; unset: BF16): `tensorwise` (E4M3, a scale a
    tensor), `hybrid` (the same, gradients in E5M2), `blockwise` (E4M3, a scale a block). Everything else stays BF16."""
    tp_comm_overlap: bool = setting(False, may_change=True)
    """Run tensor parallelism's collectives inside of the products (Transformer Engine, with sequence parallelism); all
    rows are padded to `data.row_tokens`."""
    activations_checkpoint_granularity: Literal["selective", "full"] | None = setting(None, may_change=True)
    """Recompute activations in backward: unset, `selective` (`model.recompute_modules`) or `full` (whole layers)."""
    recompute_modules: list[Literal["mlp", "core_attn"]] = setting(["mlp"], may_change=True)
    """For `selective`: the MLP, with Transformer Engine its norm, too; or the attention kernel, which frees nothing
    with `flash` or `te`."""
    activations_checkpoint_method: Literal["uniform", "block"] = setting("uniform", may_change=True)
    """For `full`: `uniform` or `block`."""
    activations_checkpoint_num_layers: int = setting(1, may_change=True, minimum=1)
    """For `full`: layers a recomputed unit (`uniform`), or recomputed layers a stage (`block`)."""
    logprob_chunk_tokens: int | None = setting(
        None, may_change=True, minimum=1, remedy="unset it to let it follow from the vocabulary"
    )
    """Predicting positions whose logits exist at a time."""
    reference_from_path: str | None = None
    """Reference model of a loss that has one, where it is not the starting weights: a model as `restore_from_path`
    takes it, of the same architecture and tokenizer."""
    reference_in_memory: bool = setting(False, may_change=True)
    """Keep the reference model of a loss that has one in memory, instead of computing its log-probabilities before.
    With adapters it is the policy without them, and costs no memory."""
    peft: PeftConfig = field(default_factory=PeftConfig)
    seed: int = setting(42, minimum=0, maximum=2**63 - 1)
    """Random start weights and the order of the data."""

    def pipeline_slots(self, num_layers: int) -> int:
        """Places that layers take over all pipeline stages, the embedding's and the loss's included."""
        return num_layers + self.account_for_embedding_in_pipeline_split + self.account_for_loss_in_pipeline_split


@dataclass
class DatasetConfig:
    """Where preference pairs come from."""

    path: str | list[str] | None = None
    """A file (JSON lines, JSON, CSV, TSV, each also .gz or .zst; Parquet), a pattern of such files (`data/*.parquet`),
    a directory saved by `datasets` or of files, a hub name, `builtin:NAME`, or a list."""
    split: str | list[str] = "train"
    """Split of hub datasets, saved dataset dictionaries and builtin tasks; a list holds one for each path."""
    weights: list[float] | None = setting(None, minimum=0, maximum=1000)
    """One a path: the fraction of it that an epoch holds (1: all, 0.5: half, 2: twice)."""
    schema: Literal["auto", "messages", "strings", "hh", "ranked", "conversation", "completion", "instruction"] = "auto"
    """`auto`: found out row by row. Pairs: `messages` (UltraFeedback-binarized), `strings` (prompt/chosen/rejected),
    `hh` (Anthropic HH), `ranked` (answers with scores). Else: `conversation`, `completion`, `instruction` (Alpaca)."""
    columns: dict[str, Any] | list[Any] | None = None
    """Columns of one's own by what layouts call them, `{prompt: question, chosen: best, rejected: worst}`: a column, a
    path into one (`a.b`, `a.0`), a list of these, or null to hide a column of that name. A list: one for each path."""
    encoding: str = "utf-8"
    """Of text files, as Python calls it: `cp1252` (Windows), `latin-1`, `utf-16`, ..."""
    delimiter: str | None = setting(None, may_be_empty=True)
    """Between the cells of a table, one character or `tab`; unset: what the first line has of comma (tab in TSV files),
    semicolon, tab and bar."""
    limit: int | None = setting(None, minimum=1, remedy="unset it for all rows")
    """Use the first N rows of each path."""

    @property
    def paths(self) -> list[str]:
        """The path or paths as a list."""
        return [self.path] if isinstance(self.path, str) else list(self.path or [])

    def split_of(self, number: int) -> str:
        """The split of a path, by its place."""
        return self.split if isinstance(self.split, str) else self.split[number]

    def columns_of(self, number: int) -> dict[str, Any] | None:
        """The columns of a path, by its place."""
        return self.columns[number] if isinstance(self.columns, list) else self.columns


@dataclass
class DataConfig:
    """Preference pairs: reading, templating, truncating, packing."""

    train: DatasetConfig = field(default_factory=DatasetConfig)
    validation: DatasetConfig = field(default_factory=lambda: DatasetConfig(split="test"))
    max_length: int = setting(2048, minimum=2)
    """Tokens of prompt and response together; responses are cut at the end."""
    max_prompt_length: int = setting(1800, minimum=1)
    """Tokens that a prompt keeps, its end, where the pair does not fit `max_length` otherwise."""
    chat_template: str | None = None
    """Unset: the tokenizer's; else a file, or a built-in name (`chatml`, `llama3`, `mistral`, `zephyr`, `plain`)."""
    template_date: str | None = None
    """The day that templates write which write one (Llama 3.2, gpt-oss), as `YYYY-MM-DD`; unset: the day on which the
    run began."""
    system_prompt: str | None = setting(None, may_be_empty=True)
    """A system message put in front of conversations that have none."""
    prompt_from: Literal["conversation", "generation_prompt"] = "conversation"
    """Where the template's generation prompt is not how its finished conversations go on (DeepSeek-R1 opens a thought):
    `conversation` lays pairs as finished conversations, `generation_prompt` on what a model is prompted with."""
    predict: Literal["assistant", "last", "all", "marked"] = "assistant"
    """What SFT predicts of a conversation: all turns of the `assistant`, their ends included, its `last` one, `all`
    tokens, or what the template marks with `{% generation %}` (`marked`). Of a pair it is the chosen response."""
    compat: Literal["released_code"] | None = None
    """`released_code` lays pairs as the paper authors' released trainer does; see docs/data.md."""
    add_special_tokens: list[str] = setting([])
    """Marks of the chat template that become tokens of their own where the tokenizer has none, as
    `['<|im_start|>','<|im_end|>']` for a base model: the embedding grows, and new rows start as the mean of the old."""
    special_tokens_in_text: Literal["keep", "error", "split"] = "keep"
    """Special tokens that texts hold: they act as such (`keep`), make a row unusable (`error`), or are ordinary text
    (`split`); the start of a run counts them."""
    on_bad_row: Literal["error", "skip"] = "error"
    """`error` stops at the first unusable row; `skip` counts and drops it."""
    on_unused_fields: Literal["warn", "error"] = "warn"
    """What becomes of rows of which something is not trained: a field that the chat template does not render
    (`tool_calls`), a column that nothing uses (`images`). The start counts them, or they are unusable (`error`)."""
    share_prompt: bool = setting(True, may_change=True)
    """Lay a pair's prompt in the row once for both responses; the numbers are the same either way."""
    row_tokens: int | None = setting(None, may_change=True, minimum=1, remedy="unset it for 2 * data.max_length")
    """Token budget of a packed row; unset: two full-length sequences, see :attr:`row_budget`."""
    cache_dir: str | None = setting(None, may_change=True)
    """Where tokenized pairs are kept; unset: `$XDG_CACHE_HOME/nemo_lmpo` or `~/.cache/nemo_lmpo`."""
    num_workers: int | None = setting(None, may_change=True, minimum=1, maximum=1024)
    """Processes that tokenize; unset: one for small data, else the number of CPU cores."""

    @property
    def row_budget(self) -> int:
        """Most tokens of a packed row: `row_tokens`, or two sequences of `max_length`."""
        return self.row_tokens or 2 * self.max_length


@dataclass
class ScheduleConfig:
    """Learning-rate schedule over the run's steps."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """`cosine`, `linear` or `constant`, each after the warm-up."""
    warmup_fraction: float = setting(0.1, minimum=0, below=1)
    """Part of all steps during which the rate rises linearly from 0."""
    min_lr: float = setting(0.0, minimum=0)
    """The rate at the end."""


@dataclass
class OptimConfig:
    """AdamW through megatron-core."""

    lr: float = setting(1e-6, minimum=0, maximum=1)
    weight_decay: float = setting(0.0, minimum=0, maximum=1)
    betas: list[float] = setting([0.9, 0.999], minimum=0, below=1)
    eps: float = setting(1e-8, above=0, maximum=1, remedy="leave it at 1e-8")
    moments_dtype: Literal["32", "bf16"] = "32"
    """What AdamW's two moments are kept in: `32`, or `bf16`, rounded at random, which takes 4 bytes less per parameter.
    A resume that names it in `checkpoint.allow_changes` converts them."""
    use_distributed_optimizer: bool = setting(False, may_change=True)
    """Shard optimizer state over the data-parallel group."""
    overlap_grad_reduce: bool = setting(False, may_change=True)
    """Reduce gradients while backward still runs."""
    overlap_param_gather: bool = setting(False, may_change=True)
    """With the distributed optimizer, gather weights while the next forward already runs."""
    cpu_offload: bool = setting(False, may_change=True)
    """Keep main parameters and moments in the host's memory, and step there (GPUs, with the distributed optimizer)."""
    sched: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class TrainerConfig:
    """How long and how to train."""

    max_epochs: int = setting(1, may_change=True, minimum=1)
    """Passes over the pairs; beside `max_steps` it must be left out."""
    max_steps: int | None = setting(None, may_change=True, minimum=1, remedy="unset it to train max_epochs")
    """Optimizer steps of the whole run; unset: `max_epochs` passes."""
    devices: int = setting(1, may_change=True, minimum=1, maximum=1024)
    """Processes a node that a recipe is laid out for; launchers and the dry run use it, a run counts its own."""
    num_nodes: int = setting(1, may_change=True, minimum=1, maximum=65536)
    accelerator: Literal["auto", "gpu", "cpu"] = setting("auto", may_change=True)
    """What to compute on; `auto`: GPUs where there are any, `cpu` hides them."""
    precision: Literal["bf16", "32"] = "bf16"
    """`bf16` (BF16 compute, float32 main parameters) or `32`."""
    gradient_clip_val: float = setting(1.0, minimum=0)
    """Largest gradient norm; 0: no clipping."""
    val_check_interval: int = setting(400, may_change=True, minimum=0)
    """Steps between validations; 0: only at the end."""
    early_stopping_patience: int = setting(0, may_change=True, minimum=0)
    """End the run after so many validations in a row without a better `checkpoint.monitor`; 0: never."""
    max_time_per_run: str | None = setting(None, may_change=True)
    """`DD:HH:MM:SS` (NeMo's form) or `HH:MM:SS`: save and exit 0 before this much time has passed."""
    distributed_timeout: float = setting(90.0, may_change=True, above=0)
    """Minutes that a process waits for another one before the run ends; longer than `step_timeout`, which shows where
    it waits."""
    num_threads: int | None = setting(
        None, may_change=True, minimum=1, maximum=1024, remedy="unset it to share the cores"
    )
    """CPU threads per process; unset: the cores shared equally by the node's processes."""
    deterministic: bool = setting(False, may_change=True)
    """The same bits from the same state on GPUs too, at some cost in speed; CPU runs are so anyway."""
    profile: list[int] | None = setting(None, may_change=True)
    """`[FIRST, LAST]`: steps to profile; traces go to `profile/` in the run directory."""
    step_timeout: float | None = setting(3600.0, may_change=True, above=0, remedy="unset it to wait for ever")
    """Seconds after which a run counts as hung in a step, a batch of a validation or reference pass, a token of sampled
    answers, loading, or saving: every rank shows where it stands, and the run ends with an error."""


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    save_interval: int = setting(100, minimum=0)
    """Steps between checkpoints; one is always saved at the end; 0: only then."""
    keep_last: int = setting(2, minimum=1, remedy="resuming needs one")
    """Newest checkpoints kept."""
    keep_best: int = setting(1, minimum=0)
    """Best checkpoints kept besides."""
    monitor: str = "val/loss"
    """Metric that ranks checkpoints."""
    mode: Literal["min", "max"] = "min"
    """`min` or `max`: which end of `monitor` is best."""
    async_save: bool | Literal["auto"] = "auto"
    """Write while training continues: `true`, `false`, or `auto`: on GPUs whose nodes have the memory for it."""
    resume: bool = True
    """Go on from the newest whole checkpoint of the run directory; `false` moves what is there aside."""
    verify: Literal["full", "size"] = "full"
    """What a resume compares of a checkpoint's files: `full` (checksums) or `size` (sizes only; no file is read)."""
    export_hf: bool = False
    """At the end of the run, write `huggingface/` into the run directory: weights, tokenizer, template, model card."""
    allow_changes: list[str] = field(default_factory=list)
    """Settings that a resume may change on purpose, such as `optim.lr` or `data.train.path` (its pairs)."""


@dataclass
class WandbConfig:
    """Weights & Biases; off unless `project` is set."""

    project: str | None = setting(None, switch=True)
    name: str | None = None
    entity: str | None = None


@dataclass
class MlflowConfig:
    """MLflow; off unless `experiment` is set."""

    experiment: str | None = setting(None, switch=True)
    name: str | None = None
    """The run's name there; unset: that of the run directory."""
    tracking_uri: str | None = None
    """The server; unset: `MLFLOW_TRACKING_URI`."""


@dataclass
class LoggingConfig:
    """What is shown and kept besides `metrics.jsonl`."""

    tensorboard: bool = True
    progress_bar: bool = True
    log_interval: int = setting(1, minimum=1)
    """Steps between lines of TensorBoard, W&B and the progress bar (`metrics.jsonl` has every step)."""
    report: bool = True
    """Draw `report.html` at the end."""
    samples: int = setting(0, minimum=0, maximum=128)
    """Prompts of the validation pairs that the policy answers, greedily, before the first step and at each
    validation; 0: none. Nothing is kept between the tokens of an answer: each costs a forward pass over all of it."""
    sample_tokens: int = setting(256, minimum=1, maximum=65536)
    """Most tokens of such an answer."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)


@dataclass
class Config:
    """One run."""

    name: str = "run"
    """The recipe's name."""
    run_dir: str | None = setting(None, may_change=True)
    """Everything the run writes; unset: `runs/<name>` under the working directory."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: Any = None
    """The dataclass of the chosen loss (see :mod:`nemo_lmpo.config.loss_section`)."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = setting(CheckpointConfig, may_change=True)
    logging: LoggingConfig = setting(LoggingConfig, may_change=True)


def all_settings(cls: type[Any] = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Dotted keys and fields; a group stands before its settings."""
    hints = types_of(cls)
    for of in dataclasses.fields(cls):
        yield prefix + of.name, of
        if dataclasses.is_dataclass(hints[of.name]):
            yield from all_settings(hints[of.name], f"{prefix}{of.name}.")


def all_keys() -> list[str]:
    """Every dotted key of the configuration, groups themselves left out."""
    keys = [key for key, _ in all_settings()]
    return [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]


def may_change(key: str) -> bool:
    """Whether a resumed run may have another value of a dotted key than before."""
    allowed = {name for name, of in all_settings() if of.metadata.get("may_change", False)}
    return any(key == name or key.startswith(f"{name}.") for name in allowed)
