"""A run's directory: whose it is, and what is written beside the checkpoints' tensors."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from nemo_lmpo.checkpoint.same_run import changed_settings, default_settings, flatten, is_admitted
from nemo_lmpo.config.recipe import config_as_dict
from nemo_lmpo.config.schema import Config
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.formats.architecture import architecture_to_hf
from nemo_lmpo.formats.sidecars import sidecar_names
from nemo_lmpo.runtime import run_files
from nemo_lmpo.runtime.chat_record import ChatRecord, chat_json, read_chat_record
from nemo_lmpo.runtime.files import directory_lock, read_small, replace_file, set_aside
from nemo_lmpo.runtime.safe_yaml import load_yaml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nemo_lmpo.formats.start_model import StartModel

_logger = logging.getLogger(__name__)


class RunDirectory:
    """``runs/<recipe>`` unless set; what lies in it is told in :mod:`nemo_lmpo.runtime.run_files`."""

    def __init__(self, config: Config) -> None:
        self.path = Path(config.run_dir) if config.run_dir else Path("runs") / config.name
        self.plain = config_as_dict(config)
        self.resumes = config.checkpoint.resume
        self.defaults = default_settings(config)
        self.allow_changes = config.checkpoint.allow_changes
        self.changes: dict[str, tuple[Any, Any]] = {}
        """What this run changes on purpose: old and new value by name (see :meth:`check_owner`)."""

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
            before = dict(flatten(load_yaml(read_small(path))))
        except (OSError, ValueError, AttributeError, TypeError):
            raise ConfigError(f"{path} is not readable; remove it or choose another run_dir") from None
        changes = changed_settings(before, dict(flatten(self.plain)), self.defaults)
        self.changes = {key: change for key, change in changes.items() if is_admitted(key, self.allow_changes)}
        refused = {key: change for key, change in changes.items() if key not in self.changes}
        if refused:
            raise ConfigError(
                f"run_dir={self.path} holds another run ({_told(refused)}); choose another run_dir, or go on with the "
                f"new values on purpose with checkpoint.allow_changes=[{','.join(refused)}]"
            )

    def _has_begun(self) -> bool:
        """Whether there is anything to lose; a run that was refused for its data leaves its configuration only."""
        metrics = self.path / run_files.METRICS
        return (metrics.is_file() and metrics.stat().st_size > 0) or any(self.checkpoints.glob("step_*"))

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Have the directory to this run alone within the block, and make it (rank 0 of the run).

        With `checkpoint.resume=false` a run that is there already is moved aside, as a whole.

        Raises:
            ConfigError: another run works in it, or holds it, or it cannot be written.
        """
        self.check_owner()
        with ExitStack() as lock:
            try:
                if not self.resumes and self.path.is_dir() and self._has_begun():
                    self._move_aside()
                self.path.mkdir(parents=True, exist_ok=True)
                lock.enter_context(directory_lock(self.path))
            except OSError as error:
                raise self._not_writable(error) from None
            self.check_owner()  # again: another run may have begun in between
            self.create()
            yield

    def _move_aside(self) -> None:
        with directory_lock(self.path):
            moved = set_aside(self.path, run_files.BEFORE)
            (moved / run_files.OWNER).unlink(missing_ok=True)
        _logger.info("checkpoint.resume=false: the run before is now %s", moved)

    def create(self) -> None:
        """Make the directory, and save the resolved configuration of a new run.

        Raises:
            ConfigError: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self._has_begun():
                self._write_config(self.path)
        except OSError as error:
            raise self._not_writable(error) from None

    def kept_template(self) -> str | None:
        """The chat template that the run to be resumed began with, whatever has become of its file since.

        None: a new run, one of an earlier version, or `checkpoint.allow_changes` names `data.chat_template` or
        `data.template_date`.

        Raises:
            CheckpointError: the file that keeps it is damaged.
        """
        path = self.path / run_files.CHAT
        changed = any(is_admitted(f"data.{name}", self.allow_changes) for name in ("chat_template", "template_date"))
        if not self.resumes or changed:
            return None
        return read_chat_record(path).template if path.is_file() and self._has_begun() else None

    def begin(self, step: int, chat: ChatRecord) -> None:
        """Save the resolved configuration once the run resumes from ``step``, and note what it changes on purpose.

        Raises:
            ConfigError: it cannot be written.
        """
        entry = {"after_step": step, "time": round(time.time(), 3), "changes": self.changes}
        try:
            self._write_config(self.path)
            replace_file(self.path / run_files.CHAT, chat_json(chat))
            if self.changes:
                with (self.path / run_files.CHANGES).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise self._not_writable(error) from None
        if self.changes:
            _logger.info("resumes after step %d with other settings on purpose: %s", step, _told(self.changes))

    def _not_writable(self, error: OSError) -> ConfigError:
        return ConfigError(f"run_dir={self.path} cannot be written ({error.strerror}); choose another one")

    def _write_config(self, directory: Path) -> None:
        replace_file(directory / run_files.CONFIG, yaml.safe_dump(self.plain, sort_keys=False))

    def write_sidecars(
        self, directory: Path, start: StartModel, tokenizer: PreTrainedTokenizerBase, chat: ChatRecord | None = None
    ) -> None:
        """What a checkpoint needs to be used on its own: configuration, architecture, tokenizer, chat template."""
        self._write_config(directory)
        replace_file(directory / run_files.ARCHITECTURE, json.dumps(model_config(start), indent=1))
        if chat is not None:
            replace_file(directory / run_files.CHAT, chat_json(chat))
        _save_tokenizer(directory / run_files.TOKENIZER, start, tokenizer)


def _told(changes: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{key}: {old!r} before, {new!r} now" for key, (old, new) in changes.items())


def _save_tokenizer(directory: Path, start: StartModel, tokenizer: PreTrainedTokenizerBase) -> None:
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


def model_config(start: StartModel) -> dict[str, Any]:
    """The Hugging Face config of the start as it was, or one made from the architecture."""
    if start.sidecars is not None and (start.sidecars / "config.json").is_file():
        original: dict[str, Any] = json.loads((start.sidecars / "config.json").read_text())
        return original
    return architecture_to_hf(start.architecture)
