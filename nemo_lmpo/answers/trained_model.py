"""A stored model as it was trained: also of checkpoints of earlier versions, which name their chat template only."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_lmpo.config.schema import DataConfig
from nemo_lmpo.data.preference import pair_encoder
from nemo_lmpo.data.tokenizer import load_tokenizer
from nemo_lmpo.errors import CheckpointError, ConfigError
from nemo_lmpo.formats.model_files import ModelFiles, open_model, with_training_chat
from nemo_lmpo.runtime import run_files
from nemo_lmpo.runtime.files import read_small
from nemo_lmpo.runtime.safe_yaml import load_yaml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OF_CHAT = ("chat_template", "system_prompt", "compat")


def open_trained(
    path: Path, *, config: Path | None = None, tokenizer: Path | None = None, chat_template: str | None = None
) -> ModelFiles:
    """As :func:`~nemo_lmpo.formats.model_files.open_model`, with the template of training in its side files.

    Checkpoints keep the template's text. Those of earlier versions name it in their configuration only, and then it
    has to be where it was, unless ``chat_template`` names another one.

    Raises:
        CheckpointError: no model, a damaged one, or one whose template is gone.
    """
    model = open_model(path, config=config, tokenizer=tokenizer)
    if model.kind != "training" or model.chat is not None or not has_tokenizer(model):
        return model
    data = _data_section(path)
    if data is None:
        return model
    if chat_template is not None:
        data.chat_template = chat_template
    own = tokenizer_of(model)
    if data.chat_template is None and own.chat_template is None:
        return model
    try:
        record = pair_encoder(data, own).record()
    except ConfigError as error:
        raise CheckpointError(
            f"{path} was trained with the chat template {data.chat_template} and keeps its name only ({error}); put "
            f"the file there again"
        ) from None
    return with_training_chat(model, record)


def read_training_config(directory: Path) -> dict[str, Any]:
    """The configuration that a checkpoint was trained with; empty for models that were not trained here.

    Raises:
        CheckpointError: it is damaged.
    """
    trained = _read_config(directory)
    try:
        trained and (trained["data"]["chat_template"], trained["data"]["system_prompt"])
    except (KeyError, TypeError):
        raise CheckpointError(f"{directory / run_files.CONFIG} is not readable; restore the file") from None
    return trained


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / run_files.CONFIG
    if not path.is_file():
        return {}
    try:
        return dict(load_yaml(read_small(path)))
    except (OSError, TypeError, ValueError):
        raise CheckpointError(f"{path} is not readable; restore the file") from None


def _data_section(directory: Path) -> DataConfig | None:
    data = _read_config(directory).get("data")
    if not isinstance(data, Mapping):
        return None
    known = {field.name for field in fields(DataConfig)} & set(_OF_CHAT)
    values = {name: data[name] for name in known if name in data}
    if not all(isinstance(value, str | None) for value in values.values()):
        raise CheckpointError(f"{directory / run_files.CONFIG} is not readable; restore the file")
    return DataConfig(**values)


def has_tokenizer(model: ModelFiles) -> bool:
    """Whether tokenizer files lie beside the weights."""
    return any(name.startswith("tokenizer") for name in model.sidecars)


def tokenizer_of(model: ModelFiles) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model's weights.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    if not has_tokenizer(model):
        raise ConfigError(f"{model.origin} holds no tokenizer; convert it with a tokenizer first")
    names = [name for name in model.sidecars if not name.endswith("config.json") or name.startswith("tokenizer")]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(model.side_file(name) or b"")
        return load_tokenizer(folder)
