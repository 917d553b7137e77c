"""A run's directory: whose it is, and what is written beside the checkpoints' tensors."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from nemo_lmpo.config.architecture import architecture_to_hf
from nemo_lmpo.config.schema import Config, may_change
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.formats.sidecars import sidecar_names
from nemo_lmpo.runtime import run_files
from nemo_lmpo.runtime.atomic import replace_file, set_aside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nemo_lmpo.formats.base_model import BaseModel

_logger = logging.getLogger(__name__)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested settings."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def default_settings(config: Config) -> dict[str, Any]:
    """What a setting is worth where a run of an earlier version does not have it: mostly its default.

    A field whose default changes what earlier versions did says so by its metadata ``absent_means``.
    """
    values = dict(flatten(dataclasses.asdict(dataclasses.replace(Config(), loss=type(config.loss)()))))
    for of in dataclasses.fields(config.loss):
        if "absent_means" in of.metadata:
            values[f"loss.{of.name}"] = of.metadata["absent_means"]
    return values


def changed_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Settings that a resumed run must have as before and has not: old and new value by dotted key.

    Settings that came later count as what they are worth without being set, and settings that are gone do not count.
    """
    changes = {}
    for key in sorted(before.keys() | now.keys()):
        if key not in now and key not in defaults and not key.startswith("model.architecture."):
            continue
        old, new = before.get(key, defaults.get(key)), now.get(key, defaults.get(key))
        if old != new and not may_change(key):
            changes[key] = (old, new)
    return changes


class RunDirectory:
    """``runs/<recipe>`` unless set: `config.yaml`, `metrics.jsonl`, `checkpoints/`, `tensorboard/`, `report.html`."""

    def __init__(self, config: Config, plain: Mapping[str, Any]) -> None:
        self.path = Path(config.run_dir) if config.run_dir else Path("runs") / config.name
        self.plain = plain
        self.resumes = config.checkpoint.resume
        self.defaults = default_settings(config)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / run_files.CHECKPOINTS

    def check_owner(self) -> None:
        """Refuse a directory that another run wrote, unless it is to be moved aside (`checkpoint.resume=false`).

        Raises:
            ConfigError: names the settings that differ.
        """
        path = self.path / run_files.CONFIG
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run_dir={self.path} is a file; give a directory")
        if not self.resumes or not path.exists() or not self._has_begun():
            return
        try:
            before = dict(flatten(yaml.safe_load(path.read_text())))
        except (yaml.YAMLError, AttributeError, TypeError):
            raise ConfigError(f"{path} is not readable; remove it or choose another run_dir") from None
        changes = changed_settings(before, dict(flatten(self.plain)), self.defaults)
        if changes:
            differing = "; ".join(f"{key}: {old!r} before, {new!r} now" for key, (old, new) in changes.items())
            raise ConfigError(
                f"run_dir={self.path} holds another run ({differing}); choose another run_dir, or remove "
                f"that one to start anew"
            )

    def _has_begun(self) -> bool:
        """Whether there is anything to lose; a run that was refused for its data leaves its configuration only."""
        metrics = self.path / run_files.METRICS
        return (metrics.is_file() and metrics.stat().st_size > 0) or any(self.checkpoints.glob("step_*"))

    def create(self) -> None:
        """Make the directory and save the resolved configuration (rank 0).

        With `checkpoint.resume=false` a run that is there already is moved aside, as a whole.

        Raises:
            ConfigError: it cannot be written.
        """
        try:
            if not self.resumes and self.path.is_dir() and self._has_begun():
                _logger.info(
                    "checkpoint.resume=false: the run before is now %s", set_aside(self.path, run_files.BEFORE)
                )
            self.path.mkdir(parents=True, exist_ok=True)
            replace_file(self.path / run_files.CONFIG, yaml.safe_dump(dict(self.plain), sort_keys=False))
        except OSError as error:
            raise ConfigError(f"run_dir={self.path} cannot be written ({error.strerror}); choose another one") from None

    def write_sidecars(self, directory: Path, start: BaseModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """What a checkpoint needs to be used on its own: configuration, architecture, tokenizer."""
        replace_file(directory / run_files.CONFIG, yaml.safe_dump(dict(self.plain), sort_keys=False))
        replace_file(directory / run_files.ARCHITECTURE, json.dumps(model_config(start), indent=1))
        _save_tokenizer(directory / run_files.TOKENIZER, start, tokenizer)


def _save_tokenizer(directory: Path, start: BaseModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The start model's own files, byte for byte; another tokenizer's as it writes itself."""
    directory.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    if start.sidecars is not None:
        names = [name for name in sidecar_names(start.sidecars) if name != "config.json"]
    if start.sidecars is None or start.tokenizer != str(start.sidecars):
        tokenizer.save_pretrained(directory)
        names = [name for name in names if name == "generation_config.json"]
    for name in names:
        assert start.sidecars is not None
        target = directory / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(start.sidecars / name, target)


def model_config(start: BaseModel) -> dict[str, Any]:
    """The Hugging Face config of the start as it was, or one made from the architecture."""
    if start.sidecars is not None and (start.sidecars / "config.json").is_file():
        original: dict[str, Any] = json.loads((start.sidecars / "config.json").read_text())
        return original
    return architecture_to_hf(start.architecture)
