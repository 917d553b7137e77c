"""Rules about settings that need no model: what fits together, what names something that exists."""

from __future__ import annotations

import codecs
import dataclasses
import math
import re
from collections.abc import Iterator
from datetime import date
from operator import attrgetter
from typing import Any

from nemo_lmpo.config.row_fields import ROW_FIELDS
from nemo_lmpo.config.schema import Config, DatasetConfig, all_settings
from nemo_lmpo.errors import ConfigError, did_you_mean, nearest, shown
from nemo_lmpo.formats.lora_targets import LINEARS, MIXTRAL, PROJECTIONS

LEAST_SLACK = 60.0
"""Seconds between the two limits of a hang, in which every rank shows its stacks and writes them down."""
LONGEST_NAME = 255
"""Bytes of a file's name."""
VALIDATION_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logps/chosen_sum",
    "logps/rejected_sum",
    "lengths/chosen",
    "lengths/rejected",
)
"""Means over the validation pairs that every loss has, without the prefix `val/`."""
CONVERSATION_METRICS = ("loss", "perplexity", "token_accuracy", "lengths/predicted")
"""What validation measures on conversations."""


def names(config: Config) -> Iterator[str]:
    """The run's name becomes a folder; paths are such that the system takes them."""
    if config.name in (".", "..") or "/" in config.name or "\n" in config.name:
        yield f"name={shown(config.name)} must be usable as a folder's name; set run_dir to write elsewhere"
    paths = {
        "name": config.name,
        "run_dir": config.run_dir,
        "data.cache_dir": config.data.cache_dir,
        "data.chat_template": config.data.chat_template,
        "model.restore_from_path": config.model.restore_from_path,
        "model.reference_from_path": config.model.reference_from_path,
        "model.tokenizer": config.model.tokenizer,
        "data.train.path": config.data.train.path,
        "data.validation.path": config.data.validation.path,
    }
    for key, value in paths.items():
        for path in value if isinstance(value, list) else [value] if value else []:
            if any(len(part.encode(errors="surrogateescape")) > LONGEST_NAME for part in path.split("/")):
                yield f"{key}={shown(path)} holds a name of more than {LONGEST_NAME} bytes; shorten it"


def sources(config: Config) -> Iterator[str]:
    """Lists of paths hold some, and there are as many weights as paths."""
    for key, which in (("data.train", config.data.train), ("data.validation", config.data.validation)):
        if which.path == []:
            yield f"{key}.path=[] holds no path; give one, or set it to null"
        if which.weights is not None and which.paths and len(which.weights) != len(which.paths):
            yield f"{key}.weights has {len(which.weights)} values for {len(which.paths)} paths; give one a path"
        elif which.weights is not None and which.paths and not any(which.weights):
            yield f"{key}.weights={which.weights} take no row; give at least one above 0"


def rows(config: Config) -> Iterator[str]:
    """Columns map fields that layouts have, and files have an encoding and a delimiter that exist."""
    for key, which in (("data.train", config.data.train), ("data.validation", config.data.validation)):
        yield from wrong_rows(key, which)


def wrong_rows(key: str, which: DatasetConfig) -> Iterator[str]:
    """What cannot be of how the rows of some paths are to be read."""
    for name, value in (("columns", which.columns), ("split", which.split)):
        if isinstance(value, list) and len(value) != len(which.paths):
            yield f"{key}.{name} has {len(value)} values for {len(which.paths)} paths; give one a path, or one only"
    if isinstance(which.columns, list) and not any(which.columns):
        yield f"{key}.columns={shown(which.columns)} maps no column; unset it"
    for columns in which.columns if isinstance(which.columns, list) else [which.columns]:
        yield from _wrong_columns(f"{key}.columns", columns)
    try:
        codecs.lookup(which.encoding.strip())
    except (LookupError, ValueError):
        yield f"{key}.encoding={shown(which.encoding)} is unknown; give utf-8, cp1252, latin-1, utf-16, ..."
    if which.delimiter is not None and which.delimiter != "tab" and len(which.delimiter) != 1:
        yield f"{key}.delimiter={shown(which.delimiter)} is not one character; give one, or tab"


def _wrong_columns(key: str, columns: Any) -> Iterator[str]:
    if columns is None:
        return
    if not isinstance(columns, dict):
        yield f"{key} holds {shown(columns)}, which is no group; give {{prompt: COLUMN, ...}} or null for each path"
        return
    for field, column in columns.items():
        if field not in ROW_FIELDS:
            meant = did_you_mean(field, ROW_FIELDS)
            yield f"{key}.{field} is no field of a layout{meant} Known: {', '.join(ROW_FIELDS)}"
        parts = column if isinstance(column, list) else [column]
        if not parts or not all(isinstance(part, str | int) or part is None for part in parts):
            yield f"{key}.{field}={shown(column)} is not a column; give its name, a path, a list of these, or null"


def lengths(config: Config) -> Iterator[str]:
    """A prompt leaves room for a response, and a packed row for a pair."""
    data = config.data
    if data.max_prompt_length >= data.max_length:
        yield (
            f"data.max_prompt_length={data.max_prompt_length} leaves no room for a response within "
            f"data.max_length={data.max_length}; lower it"
        )
    longest = 2 * data.max_length - (data.max_prompt_length if data.share_prompt else 0)
    if data.row_tokens is not None and data.row_tokens < longest:
        yield (
            f"data.row_tokens={data.row_tokens} may be too small for one pair of data.max_length={data.max_length}; "
            f"set it to at least {2 * data.max_length}, or unset it"
        )


def template_date(config: Config) -> Iterator[str]:
    """The day that templates write is one."""
    value = config.data.template_date
    try:
        parsed = date.fromisoformat(str(value)).isoformat() if value is not None else None
    except ValueError:
        parsed = None
    if parsed != value:
        yield f"data.template_date={shown(value)} is not a day; write it as 2026-12-01, or unset it"


def schedule(config: Config) -> Iterator[str]:
    """The rate falls, and AdamW has two betas."""
    optim = config.optim
    if optim.sched.min_lr > optim.lr:
        yield f"optim.sched.min_lr={optim.sched.min_lr} is above optim.lr={optim.lr}; lower it"
    if len(optim.betas) != 2:
        yield f"optim.betas={optim.betas} must be two numbers from 0 to below 1, as [0.9, 0.999]"


def amount(config: Config) -> Iterator[str]:
    """Training is counted in steps or in epochs."""
    epochs, steps = config.trainer.max_epochs, config.trainer.max_steps
    if steps is not None and epochs != 1:
        yield (
            f"trainer.max_epochs={epochs} has no effect beside trainer.max_steps={steps}; set trainer.max_steps=null "
            f"to train by epochs, or leave trainer.max_epochs out"
        )


def duration(config: Config) -> Iterator[str]:
    """Time limits can be read."""
    try:
        parse_duration(config.trainer.max_time_per_run)
    except ConfigError as error:
        yield str(error)


def parse_duration(text: str | None) -> float | None:
    """Seconds of `DD:HH:MM:SS`, `HH:MM:SS` or `MM:SS`; None stays None.

    Raises:
        ConfigError: another form.
    """
    if text is None:
        return None
    if not re.fullmatch(r"\d+(:\d+){1,3}", str(text)):
        raise ConfigError(
            f"trainer.max_time_per_run={text!r} is not a duration; write DD:HH:MM:SS or HH:MM:SS, as '03:45:00'"
        )
    seconds = 0
    for number, unit in zip(reversed(str(text).split(":")), (1, 60, 3600, 86400), strict=False):
        seconds += int(number) * unit
    return float(seconds)


def timeouts(config: Config) -> Iterator[str]:
    """A hang ends by the watchdog that shows the stacks, not by the library that ends the process before it."""
    trainer = config.trainer
    if trainer.step_timeout is not None and 60 * trainer.distributed_timeout < trainer.step_timeout + LEAST_SLACK:
        least = math.ceil((trainer.step_timeout + LEAST_SLACK) / 60)
        yield (
            f"trainer.distributed_timeout={trainer.distributed_timeout:g} minutes ends a run that hangs before "
            f"trainer.step_timeout={trainer.step_timeout:g} seconds can show where it stands; set "
            f"trainer.distributed_timeout={least} or more, or a shorter trainer.step_timeout"
        )


def profile(config: Config) -> Iterator[str]:
    """Steps to profile are a first and a last one."""
    steps = config.trainer.profile
    if steps is not None and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        yield f"trainer.profile={steps} must be a first and a last step, as [10,12]; unset it to profile nothing"


def monitor(config: Config) -> Iterator[str]:
    """Checkpoints are ranked by something that validation measures."""
    wanted = config.checkpoint.monitor
    metric = wanted.removeprefix("val/")
    mixed = len(config.data.validation.paths) > 1  # a mixture's metrics come for every source, too
    measured: tuple[str, ...] = VALIDATION_METRICS
    if "conversations" in config.loss.takes:
        measured = (*VALIDATION_METRICS, *CONVERSATION_METRICS[1:])
    metric = metric.split("/", 1)[-1] if mixed and metric.split("/", 1)[-1] in measured else metric
    known = metric in measured or metric.startswith(f"{config.loss.name}/")
    if not wanted.startswith("val/") or not known:
        choices = ", ".join(f"val/{name}" for name in measured)
        yield f"checkpoint.monitor={shown(wanted)} is not a validation metric; choose {choices}"


def early_stopping(config: Config) -> Iterator[str]:
    """Patience counts validations, so there must be some."""
    patience, interval = config.trainer.early_stopping_patience, config.trainer.val_check_interval
    if patience and (config.data.validation.path is None or interval == 0):
        yield (
            f"trainer.early_stopping_patience={patience} counts validations; set data.validation.path and "
            f"trainer.val_check_interval above 0"
        )


def samples(config: Config) -> Iterator[str]:
    """Samples answer validation prompts, so there must be some."""
    if config.logging.samples and config.data.validation.path is None:
        yield (
            f"logging.samples={config.logging.samples} answers prompts of the validation pairs; set "
            f"data.validation.path, or logging.samples to 0"
        )


def added_tokens(config: Config) -> Iterator[str]:
    """Adapters leave the embedding as it is, in which new tokens would all stay alike."""
    if config.data.add_special_tokens and config.model.peft.name is not None:
        yield (
            f"data.add_special_tokens={config.data.add_special_tokens} adds rows to the embedding, which "
            f"model.peft.name={config.model.peft.name} leaves untrained; train the whole model, or give a chat "
            f"template whose marks are tokens already"
        )
    for token in config.data.add_special_tokens:
        if not token.strip() or token.isalnum():  # a word would be one token in every text
            yield f"data.add_special_tokens holds {shown(token)}, which is no mark; leave it out"


def prediction(config: Config) -> Iterator[str]:
    """What is predicted of conversations matters where conversations are trained on, and leaves prompts to answer."""
    predict = config.data.predict
    if predict != "assistant" and "conversations" not in config.loss.takes:
        yield f"data.predict={predict} has an effect only with loss=sft; leave it out, or set that"
    elif predict == "all" and config.logging.samples:
        yield (
            f"logging.samples={config.logging.samples} answers what stands in front of the first predicted token, and "
            f"data.predict=all predicts all; set logging.samples=0, or data.predict=assistant"
        )


def reference(config: Config) -> Iterator[str]:
    """A reference model is kept only where a loss compares with one."""
    other = config.model.reference_from_path
    if other is not None and not config.loss.needs_reference:
        yield (
            f"model.reference_from_path={shown(other)}, but loss.name={config.loss.name} compares with no reference "
            "model; leave it out"
        )
    if other is not None and config.loss.needs_reference and config.model.peft.name is not None:
        yield (
            f"model.reference_from_path={shown(other)} is not for adapters, whose reference is their base; leave it out"
        )
    if config.model.reference_in_memory and not config.loss.needs_reference:
        yield (
            f"model.reference_in_memory=true, but loss.name={config.loss.name} compares with no reference model; "
            f"remove it"
        )


def adapters(config: Config) -> Iterator[str]:
    """Adapters sit on projections that there are."""
    targets = config.model.peft.target_modules
    known = (*PROJECTIONS, *LINEARS, "all-linear")
    for name in targets:
        if name not in known and name not in MIXTRAL:
            yield f"model.peft.target_modules names {shown(name)}, which no layer has; choose of {', '.join(known)}"
    if not targets:
        yield "model.peft.target_modules=[] names no projection; give at least one, or [all-linear]"


def groups_that_are_off(config: Config) -> Iterator[str]:
    """A group that is off has no settings of its own: they would be ignored."""
    for switch in (key for key, of in all_settings() if of.metadata.get("switch", False)):
        group_name, _, name = switch.rpartition(".")
        group = attrgetter(group_name)(config)
        if getattr(group, name) is not None:
            continue
        plain = type(group)()
        for other in dataclasses.fields(group):
            value, default = getattr(group, other.name), getattr(plain, other.name)
            if other.name != name and value != default:
                key = f"{group_name}.{other.name}"
                yield (
                    f"{key}={shown(value)} has no effect while {switch} is unset; set {switch} too, or leave {key} at "
                    f"{shown(default)}"
                )


def released_layout(config: Config) -> Iterator[str]:
    """The released code's layout knows one way to lay a prompt."""
    data = config.data
    if data.compat == "released_code" and data.prompt_from != "conversation":
        yield f"data.prompt_from={data.prompt_from} has no effect with data.compat=released_code; remove one of them"


def parallelism(config: Config) -> Iterator[str]:
    """What splits work further needs the split that it builds on."""
    model = config.model
    if model.sequence_parallel and model.tensor_model_parallel_size == 1:
        yield (
            "model.sequence_parallel=true needs model.tensor_model_parallel_size of at least 2; "
            "set it to false, there is nothing to split"
        )
    if model.virtual_pipeline_model_parallel_size is not None and model.pipeline_model_parallel_size == 1:
        yield (
            f"model.virtual_pipeline_model_parallel_size={model.virtual_pipeline_model_parallel_size} needs "
            f"model.pipeline_model_parallel_size of at least 2; unset it"
        )


def balance(config: Config) -> Iterator[str]:
    """A coefficient belongs to a term."""
    model, plain = config.model, type(config.model)()
    if model.moe_aux_loss is None and model.moe_aux_loss_coefficient != plain.moe_aux_loss_coefficient:
        yield (
            f"model.moe_aux_loss_coefficient={model.moe_aux_loss_coefficient} has no effect while model.moe_aux_loss "
            f"is unset; set model.moe_aux_loss too, or leave the coefficient at {plain.moe_aux_loss_coefficient}"
        )


def fully_sharded(config: Config) -> Iterator[str]:
    """Weights that ranks share are gathered and freed in the order of one micro-batch after the other."""
    model = config.model
    if model.fsdp and model.pipeline_model_parallel_size > 1:
        yield (
            f"model.fsdp=true does not go with model.pipeline_model_parallel_size="
            f"{model.pipeline_model_parallel_size}, whose stages have several micro-batches under way; set it to 1, or "
            f"model.fsdp=false with optim.use_distributed_optimizer=true"
        )


def allowed_changes(config: Config) -> Iterator[str]:
    """What a resume may change on purpose are settings that exist."""
    if not config.checkpoint.allow_changes:
        return
    known = [key for key, _ in all_settings()]
    known += [f"loss.{of.name}" for of in dataclasses.fields(config.loss)] if config.loss is not None else []
    for key in config.checkpoint.allow_changes:
        if key not in known and not key.startswith("model.architecture."):
            near = nearest(key, known, likeness=0.85)
            hint = f"did you mean {near}?" if near else "give settings such as optim.lr"
            yield f"checkpoint.allow_changes names {shown(key)}, which is not a setting; {hint}"
