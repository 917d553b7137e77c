"""Saving and resuming: megatron-core distributed checkpoints that appear by one rename when they are whole.

A run's `checkpoints/` holds directories `step_0000100/` with::

    state/             weights, optimizer, random states: a megatron-core distributed checkpoint
    progress.json      step, margin statistics, metrics, layout
    config.yaml        the run's resolved configuration
    architecture.json  the model's Hugging Face config
    tokenizer/         the tokenizer's files
    manifest.json      size of every file above; written last

A checkpoint being written is called `step_0000100.tmp`.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import queue
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nemo_lmpo.config.schema import CheckpointConfig
from nemo_lmpo.errors import TrainingError, UserError
from nemo_lmpo.runtime.atomic import replace_file
from nemo_lmpo.runtime.children import following_forks, following_queue

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
STATE = "state"
_NAME = re.compile(r"step_(\d{7,})")

_logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """What must survive besides tensors."""

    step: int = 0
    """Finished optimizer steps."""
    statistics: dict[str, Any] | None = None
    """State of the running margin statistics."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics when it was saved, validation ones included; `checkpoint.monitor` ranks by them."""
    layout: dict[str, int] = field(default_factory=dict)
    """Sizes of the parallel groups that wrote it."""
    save_seconds: float = 0.0
    """How long the last save took; a resumed run reserves as much before its time limit."""


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step_{step:07d}"


def saved_steps(root: Path) -> list[int]:
    """Steps of visible checkpoints, oldest first."""
    if not root.is_dir():
        return []
    return sorted(int(match[1]) for entry in root.iterdir() if (match := _NAME.fullmatch(entry.name)))


def find_damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint directory by its manifest, or None."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        for name, size in manifest["files"].items():
            actual = (directory / name).stat().st_size
            if actual != size:
                return f"{name} has {actual} bytes instead of {size}"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        return f"{MANIFEST} is not readable"
    return None


def write_manifest(directory: Path) -> None:
    """List every file with its size; the last file of a checkpoint."""
    files = {
        str(path.relative_to(directory)): path.stat().st_size for path in sorted(directory.rglob("*")) if path.is_file()
    }
    replace_file(directory / MANIFEST, json.dumps({"files": files}, indent=1))


def on_main_rank(action: Callable[[], Any]) -> Any:
    """Run ``action`` on rank 0 and give every rank its result, or raise its user error on every rank.

    Communicates: one object broadcast over all ranks. A rank that failed alone would leave the others waiting.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (UserError, TrainingError, OSError) as error:
            outcome[1] = error
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


class CheckpointManager:
    """Saves, prunes and finds a run's checkpoints. All ranks call every method together."""

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        *,
        make_state: Callable[[bool], dict[str, Any]],
        load_state: Callable[[dict[str, Any], TrainState], None],
        write_sidecars: Callable[[Path], None],
        state_bytes: int,
        layout: dict[str, int],
    ) -> None:
        """Collect what saving needs.

        Args:
            root: the run's `checkpoints/`.
            config: how often and how many.
            make_state: sharded state dict of model, optimizer and random states; told whether it is for loading.
            load_state: puts a loaded state dict back.
            write_sidecars: writes config, architecture and tokenizer into a directory (called on rank 0).
            state_bytes: size of a checkpoint, to check the disk before writing.
            layout: sizes of the parallel groups.
        """
        self.root = root
        self.config = config
        self.make_state = make_state
        self.load_state = load_state
        self.write_sidecars = write_sidecars
        self.state_bytes = state_bytes
        self.layout = layout
        self.loading: TrainState | None = None
        """Progress of the checkpoint that is being loaded."""
        self._queue: Any = None
        self._in_background: Path | None = None
        """The checkpoint that was last given to background writers."""

    def save(self, progress: TrainState) -> float:
        """Write a checkpoint; returns the seconds that training was held up.

        With `checkpoint.async_save` it becomes visible at a later :meth:`poll` or :meth:`wait`.

        Raises:
            TrainingError: it could not be written; older checkpoints are untouched.
        """
        self.wait()
        started = time.monotonic()
        progress.layout = self.layout
        final = step_directory(self.root, progress.step)
        temporary = final.with_suffix(".tmp")
        try:
            on_main_rank(lambda: self._prepare(temporary))
            with following_forks():
                request = self._write_state(temporary / STATE)
                if request is not None:
                    request.finalize_fns.append(lambda: self._finish(temporary, final, progress))
                    self._in_background = final
                    self._async_queue().schedule_async_request(request)
            if request is None:
                self._finish(temporary, final, progress)
        except _storage_errors() as error:
            self._discard(temporary)
            raise _save_error(final, error) from error
        return time.monotonic() - started

    def _write_state(self, directory: Path) -> Any:
        from megatron.core import dist_checkpointing

        serve_write_results(in_background=self.config.async_save)
        save = dist_checkpointing.save
        # Newer versions would take the writers of nvidia-resiliency-ext, which pip does not bring along.
        own_writers = {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(save).parameters else {}
        return save(self.make_state(False), str(directory), async_sharded_save=self.config.async_save, **own_writers)

    def _prepare(self, temporary: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / STATE).mkdir(parents=True)
        free = shutil.disk_usage(temporary).free
        if free < self.state_bytes:
            raise TrainingError(
                f"a checkpoint needs {self.state_bytes / 2**30:.2f} GiB, but {self.root} has {free / 2**30:.2f} GiB "
                f"free; free the disk or lower checkpoint.keep_last={self.config.keep_last}, then resume"
            )

    def _finish(self, temporary: Path, final: Path, progress: TrainState) -> None:
        on_main_rank(lambda: self._publish(temporary, final, progress))

    def _publish(self, temporary: Path, final: Path, progress: TrainState) -> None:
        self.write_sidecars(temporary)
        replace_file(temporary / PROGRESS, json.dumps(vars(progress), indent=1))
        write_manifest(temporary)
        if final.exists():
            # Only a damaged one can stand here: a good one would have been resumed from.
            shutil.rmtree(final)
        temporary.replace(final)
        self._prune()

    def _discard(self, temporary: Path) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)

    def _async_queue(self) -> Any:
        if self._queue is None:
            from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

            self._queue = AsyncCallsQueue()
        return self._queue

    def poll(self) -> None:
        """Make a checkpoint visible whose background writing has ended; communicates if one is under way."""
        self._finalize(blocking=False)

    def wait(self) -> None:
        """Wait until all checkpoints are written and visible."""
        self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> None:
        """Publish what was written in the background.

        Raises:
            TrainingError: it could not be written.
        """
        if self._queue is None:
            return
        try:
            self._queue.maybe_finalize_async_calls(blocking=blocking)
        except _storage_errors() as error:
            assert self._in_background is not None
            self._discard(self._in_background.with_suffix(".tmp"))
            raise _save_error(self._in_background, error) from error

    def _prune(self) -> None:
        """Keep the newest and the best; called on rank 0 after a new one became visible."""
        steps = saved_steps(self.root)
        keep = set(steps[-max(self.config.keep_last, 1) :])
        keep.update(self._best(steps))
        for step in steps:
            if step not in keep:
                doomed = step_directory(self.root, step)
                # Out of sight first, so that a kill while files go leaves no half-deleted checkpoint in view.
                grave = doomed.with_suffix(".deleted")
                doomed.replace(grave)
                shutil.rmtree(grave, ignore_errors=True)

    def _best(self, steps: list[int]) -> list[int]:
        ranked: list[tuple[float, int]] = []
        for step in steps:
            value = self._monitored(step)
            if value is not None and not math.isnan(value):
                ranked.append((value if self.config.mode == "min" else -value, step))
        return [step for _, step in sorted(ranked)[: self.config.keep_best]]

    def _monitored(self, step: int) -> float | None:
        try:
            metrics = json.loads((step_directory(self.root, step) / PROGRESS).read_text())["metrics"]
            return float(metrics[self.config.monitor])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def clean(self) -> None:
        """Remove what an interrupted save or deletion left behind (rank 0)."""
        if dist.get_rank() == 0 and self.root.is_dir():
            for entry in self.root.iterdir():
                if entry.suffix in (".tmp", ".deleted") and _NAME.fullmatch(entry.stem):
                    shutil.rmtree(entry, ignore_errors=True)

    def load_newest(self) -> TrainState:
        """Resume from the newest good checkpoint; damaged ones are named and skipped.

        Returns:
            Its progress, or that of a new run when there is none.
        """
        for step in reversed(on_main_rank(lambda: saved_steps(self.root))):
            directory = step_directory(self.root, step)
            damage = on_main_rank(partial(find_damage, directory))
            if damage is None:
                try:
                    return self._load(directory)
                except _storage_errors() as error:
                    damage = _reason(error)
            if dist.get_rank() == 0:
                _logger.warning("checkpoint %s is damaged (%s); trying the one before", directory, damage)
        return TrainState()

    def _load(self, directory: Path) -> TrainState:
        from megatron.core import dist_checkpointing

        progress = TrainState(**json.loads((directory / PROGRESS).read_text()))
        self.loading = progress
        state = dist_checkpointing.load(self.make_state(True), str(directory / STATE))
        self.load_state(state, progress)
        return progress


def serve_write_results(*, in_background: bool) -> None:
    """Give megatron-core's writers the queue in which they report.

    Its own is a server process, which imports everything again and outlives a killed run. A synchronous save needs
    none, as this process itself puts and gets; for an asynchronous one the server ends with this process.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    present = getattr(filesystem_async, "_results_queue", None)
    if in_background and (present is None or isinstance(present, queue.Queue)):
        filesystem_async._results_queue = following_queue()
    elif present is None:
        filesystem_async._results_queue = queue.Queue()


def _storage_errors() -> tuple[type[BaseException], ...]:
    """What reading and writing a distributed checkpoint raises where a file or the disk is at fault."""
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException  # wraps what a rank raised; no Exception

    return OSError, RuntimeError, EOFError, ValueError, KeyError, CheckpointingException, CheckpointException


def _reason(error: BaseException) -> str:
    """One line; what a rank raised stands last in what torch made of it."""
    failures = getattr(error, "failures", None)
    if failures:
        wrapped = next(iter(failures.values()))
        error = wrapped[0] if isinstance(wrapped, tuple) else wrapped
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _save_error(final: Path, error: BaseException) -> TrainingError:
    full = "No space left on device" in str(error)
    remedy = "free the disk" if full else "remove the cause"
    return TrainingError(
        f"checkpoint {final} could not be written ({_reason(error)}); older ones are "
        f"untouched: {remedy} and repeat the command to resume"
    )
