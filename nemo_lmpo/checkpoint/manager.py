"""Saving and resuming: megatron-core distributed checkpoints that appear by one rename when they are whole.

What a run's `checkpoints/` holds is told in :mod:`nemo_lmpo.runtime.run_files`. A checkpoint is looked at before
anything of it is loaded: damage in its files makes a resume fall back to the one before, which all ranks decide
together. Whatever goes wrong after that is not damage and ends the run, so nothing that was loaded in part ever trains.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nemo_lmpo.checkpoint.agreement import disk_is_full, from_all_ranks, on_main_rank, reason_of, storage_errors
from nemo_lmpo.checkpoint.finite import find_not_finite
from nemo_lmpo.checkpoint.manifest import STEP_KEY, find_damage, inspect, write_manifest
from nemo_lmpo.checkpoint.progress import DamageError, Progress
from nemo_lmpo.checkpoint.random_state import read_random_state, sharded_random_state
from nemo_lmpo.checkpoint.writers import Writing, Written, begin_writing
from nemo_lmpo.config.schema import CheckpointConfig
from nemo_lmpo.errors import CheckpointError, TrainingError, UserError
from nemo_lmpo.formats.distributed_reader import reading_safely
from nemo_lmpo.runtime import run_files
from nemo_lmpo.runtime.children import following_forks
from nemo_lmpo.runtime.files import format_bytes, replace_file, set_aside
from nemo_lmpo.runtime.run_files import saved_steps, step_directory

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveCost:
    """What a checkpoint that became visible took."""

    step: int
    num_bytes: int
    """Of all ranks' data files."""
    held_up: float
    """Seconds that training waited for it."""
    writing: float
    """Seconds of the slowest rank's writers, checksums and the disk's confirmation included."""
    in_background: bool

    @property
    def seconds(self) -> float:
        """What a save takes where nothing else can be done meanwhile."""
        return self.held_up + (self.writing if self.in_background else 0.0)


@dataclass
class CheckpointManager:
    """Saves, prunes and finds a run's checkpoints. All ranks call every method together."""

    root: Path
    """The run's `checkpoints/`."""
    config: CheckpointConfig
    """How often and how many."""
    make_state: Callable[[Progress | None], dict[str, Any]]
    """Sharded state dict of model and optimizer; told the progress of the checkpoint that is to be loaded into it, or
    None for saving."""
    load_state: Callable[[dict[str, Any], Progress], None]
    """Puts a loaded state dict back; ``random_state`` is in it if the layout is the same."""
    write_sidecars: Callable[[Path], None]
    """Writes config, architecture and tokenizer into a directory (called on rank 0)."""
    state_bytes: int
    """Size of a checkpoint, to check the disk before writing."""
    layout: dict[str, int]
    """Sizes of the parallel groups."""
    find_missing: Callable[[Progress], str | None]
    """What of a progress is not there that this run needs; raises a UserError where the run does not fit the
    checkpoint. Called before anything is loaded."""
    data: dict[str, str]
    """Fingerprints of the pairs, kept with every checkpoint."""
    base: str
    """Hash of the weights that adapters belong to, kept with every checkpoint of adapters."""
    in_background: bool = False
    """Whether checkpoints are written while training goes on."""
    held_up: float = field(default=0.0, init=False)
    """Seconds of this process that training waited for saving."""
    costs: list[SaveCost] = field(default_factory=list, init=False)
    """Of checkpoints that became visible, oldest first; whoever shows them takes them out."""
    _queue: Any = field(default=None, init=False)
    _in_background: Path | None = field(default=None, init=False)
    """The checkpoint that was last given to background writers."""
    _held_before: float = field(default=0.0, init=False)
    """:attr:`held_up` when the checkpoint that is being written was begun."""
    _published: tuple[int, list[Written]] | None = field(default=None, init=False)
    """Step and what each rank wrote, of a checkpoint whose cost is not counted yet."""

    @contextmanager
    def _holding_up(self) -> Iterator[None]:
        """Count the block's time, and the cost of what it published."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.held_up += time.monotonic() - started
        if self._published is not None:
            (step, parts), self._published = self._published, None
            self.costs.append(
                SaveCost(
                    step=step,
                    num_bytes=sum(part.num_bytes for part in parts),
                    held_up=self.held_up - self._held_before,
                    writing=max(part.seconds for part in parts),
                    in_background=self.in_background,
                )
            )

    def save(self, progress: Progress) -> None:
        """Write a checkpoint.

        With :attr:`in_background` it becomes visible at a later :meth:`poll` or :meth:`wait`.

        Raises:
            TrainingError: it could not be written, or weights or moments are not finite; older checkpoints are
                untouched.
        """
        self.wait()
        self._held_before = self.held_up
        with self._holding_up():
            self._save(progress)

    def _save(self, progress: Progress) -> None:
        progress.layout, progress.data, progress.base = self.layout, self.data, self.base
        final = step_directory(self.root, progress.step)
        temporary = final.with_suffix(run_files.TEMPORARY)
        state = {**self.make_state(None), "random_state": sharded_random_state(), STEP_KEY: progress.step}
        if (broken := find_not_finite(state, progress.statistics)) is not None:
            raise TrainingError(self._not_finite(broken, progress.step))
        on_main_rank(lambda: self._prepare(temporary, final))
        try:
            writing = begin_writing(state, temporary / run_files.STATE, in_background=self.in_background)
            writing.request.finalize_fns.append(lambda: self._finish(temporary, final, progress, writing))
            if not self.in_background:
                writing.request.execute_sync()
                return
            self._in_background = final
            with following_forks():
                self._async_queue().schedule_async_request(writing.request)
        except storage_errors() as error:
            self._discard(temporary)
            raise _save_error(final, error) from error

    def _not_finite(self, broken: str, step: int) -> str:
        steps: list[int] = on_main_rank(lambda: saved_steps(self.root))
        what = f"after step {step} the run holds NaN or infinity in {broken}; it was not saved"
        if not steps:
            return f"{what}, and there is no earlier checkpoint: start again with a lower optim.lr"
        return (
            f"{what}, and {step_directory(self.root, steps[-1])} is kept: run the same command to resume from there; "
            f"if it happens again, lower optim.lr with checkpoint.allow_changes=[optim.lr], or look at the pairs of "
            f"these steps"
        )

    def _prepare(self, temporary: Path, final: Path) -> None:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / run_files.STATE).mkdir(parents=True)
            free = shutil.disk_usage(temporary).free
        except OSError as error:
            raise _save_error(final, error) from error
        if free < self.state_bytes:
            shutil.rmtree(temporary, ignore_errors=True)
            raise TrainingError(
                f"checkpoint {final} could not be written: it needs {format_bytes(self.state_bytes)}, and {self.root} "
                f"has {format_bytes(free)} free; older ones are untouched: free the disk or lower "
                f"checkpoint.keep_last={self.config.keep_last}, and run the same command to resume"
            )

    def _finish(self, temporary: Path, final: Path, progress: Progress, writing: Writing) -> None:
        """Every rank tells what its writers found; rank 0 adds the small files, and publishes."""
        parts: list[Written] = from_all_ranks(writing.written())
        checksums = {f"{run_files.STATE}/{name}": found for part in parts for name, found in part.checksums.items()}
        on_main_rank(lambda: self._publish(temporary, final, progress, checksums))
        self._published = progress.step, parts

    def _publish(self, temporary: Path, final: Path, progress: Progress, checksums: dict[str, str]) -> None:
        self.write_sidecars(temporary)
        replace_file(temporary / run_files.PROGRESS, json.dumps(vars(progress), indent=1))
        write_manifest(temporary, checksums)
        if final.exists():
            set_aside(final, run_files.REPLACED)
        temporary.replace(final)
        self._prune(progress.step)

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
        if self._queue is None or not self._queue.get_num_unfinalized_calls():
            return
        try:
            with self._holding_up():
                self._queue.maybe_finalize_async_calls(blocking=blocking)
        except storage_errors() as error:
            assert self._in_background is not None
            self._discard(self._in_background.with_suffix(run_files.TEMPORARY))
            raise _save_error(self._in_background, error) from error

    def _prune(self, published: int) -> None:
        """Keep the newest and the best; called on rank 0 after ``published`` became visible.

        Only whole checkpoints count, and later ones than the published one are not this run's to remove.
        """
        steps = [step for step in saved_steps(self.root) if step < published]
        steps = [step for step in steps if find_damage(step_directory(self.root, step), content=False) is None]
        steps.append(published)
        keep = {published, *steps[-max(self.config.keep_last, 1) :], *self._best(steps)}
        for step in steps:
            if step not in keep:
                expired = step_directory(self.root, step)
                # Out of sight first, so that a kill while files go leaves no half-deleted checkpoint in view.
                trash = expired.with_suffix(run_files.DELETED)
                expired.replace(trash)
                shutil.rmtree(trash, ignore_errors=True)

    def _best(self, steps: list[int]) -> list[int]:
        sign = 1 if self.config.mode == "min" else -1
        ranked = sorted((sign * value, step) for step in steps if not math.isnan(value := self._monitored(step)))
        return [step for _, step in ranked[: self.config.keep_best]]

    def _monitored(self, step: int) -> float:
        """What a checkpoint is ranked by; NaN where it does not tell."""
        try:
            metrics = json.loads((step_directory(self.root, step) / run_files.PROGRESS).read_text())["metrics"]
            return float(metrics[self.config.monitor])
        except (OSError, ValueError, KeyError, TypeError):
            return math.nan

    def clean(self) -> None:
        """Remove what an interrupted save or deletion left behind (rank 0)."""
        if dist.get_rank() == 0 and self.root.is_dir():
            for entry in self.root.iterdir():
                left_over = entry.suffix in (run_files.TEMPORARY, run_files.DELETED)
                if left_over and run_files.step_of(entry.stem) is not None:
                    shutil.rmtree(entry, ignore_errors=True)

    def load_newest(self) -> Progress:
        """Resume from the newest whole checkpoint; damaged ones are named, skipped, and renamed `step_N.damaged`.

        Returns:
            Its progress, or that of a new run when there is no checkpoint at all.

        Raises:
            CheckpointError: there are checkpoints, but none is whole.
            TrainingError: a whole one could not be loaded, for whatever reason; this process's weights are then of no
                use any more.
            UserError: the run does not fit the checkpoint.
        """
        damaged: dict[Path, str] = {}
        try:
            steps = on_main_rank(lambda: saved_steps(self.root))
        except OSError as error:
            raise CheckpointError(f"{self.root} cannot be read ({error.strerror}); make it readable") from None
        for step in reversed(steps):
            directory = step_directory(self.root, step)
            progress = self._inspect(directory, step, damaged)
            if progress is not None:
                self._load(directory, progress)
                self._set_damaged_aside(damaged, directory)
                return progress
        if damaged:
            found = "; ".join(f"{directory.name}: {reason}" for directory, reason in damaged.items())
            raise CheckpointError(
                f"no checkpoint in {self.root} can be read ({found}); nothing was changed: restore one of them, or set "
                f"checkpoint.resume=false, which moves this run aside and starts anew"
            )
        return Progress()

    def _inspect(self, directory: Path, step: int, damaged: dict[Path, str]) -> Progress | None:
        """The progress of a whole checkpoint; else None and an entry in ``damaged``. All ranks come to the same."""
        progress: Progress | None = None
        found: str | Exception | None = None
        try:
            content = self.config.verify == "full"
            progress = inspect(directory, step, content=content, share=(dist.get_rank(), dist.get_world_size()))
            found = self.find_missing(progress)
        except DamageError as error:
            found = str(error)
        except UserError as error:
            found = error
        except OSError as error:
            found = TrainingError(f"{directory} could not be looked at ({error.strerror}); run the same command again")
        findings = [finding for finding in from_all_ranks(found) if finding is not None]
        for finding in findings:
            if isinstance(finding, Exception):
                raise finding
        if findings:
            damaged[directory] = findings[0]
            return None
        return progress

    def _set_damaged_aside(self, damaged: dict[Path, str], used: Path) -> None:
        """Rename what was skipped, so that it neither counts as a checkpoint nor is written over."""
        for directory, reason in damaged.items():
            try:
                kept = on_main_rank(partial(set_aside, directory, run_files.DAMAGED))
            except OSError as error:
                raise TrainingError(f"{directory} is damaged ({reason}) and cannot be renamed ({error})") from None
            if dist.get_rank() == 0:
                _logger.warning(
                    "checkpoint %s is damaged (%s); going on from %s, and keeping it as %s",
                    directory,
                    reason,
                    used.name,
                    kept.name,
                )

    def _load(self, directory: Path, progress: Progress) -> None:
        from megatron.core import dist_checkpointing

        try:
            with reading_safely():
                state = dist_checkpointing.load(self.make_state(progress), str(directory / run_files.STATE))
            if (broken := find_not_finite(state, None)) is not None:
                raise CheckpointError(
                    f"checkpoint {directory} holds NaN or infinity in {broken}; nothing was changed: remove it, and "
                    f"run the same command again with a lower optim.lr and checkpoint.allow_changes=[optim.lr]"
                )
            if progress.layout == self.layout:
                state["random_state"] = read_random_state(directory / run_files.STATE)
            self.load_state(state, progress)
        except UserError:
            raise
        except storage_errors() as error:
            raise TrainingError(
                f"checkpoint {directory} could not be loaded ({type(error).__name__}: {reason_of(error)}); nothing was "
                f"changed: remove the cause and run the same command again{_HINT[self.config.verify]}"
            ) from error


_HINT = {"full": "", "size": ", or set checkpoint.verify=full to have its files looked at"}


def _save_error(final: Path, error: BaseException) -> TrainingError:
    # megatron-core 0.19 passes on no more of its writers' errors than their class.
    remedy = "free the disk" if disk_is_full(error) else "remove the cause, often a full disk,"
    reason = "the disk is full or a limit on files was reached" if "unexpected pos" in str(error) else reason_of(error)
    return TrainingError(
        f"checkpoint {final} could not be written ({reason}); older ones are untouched: {remedy} and run the "
        f"same command to resume"
    )
