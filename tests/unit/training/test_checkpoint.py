"""Checkpoints: which are kept, which are loaded, and what a full disk leaves."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_lmpo.checkpoint import manager as checkpoint_module
from nemo_lmpo.checkpoint.manager import CheckpointManager, TrainState, find_damage, saved_steps, step_directory
from nemo_lmpo.checkpoint.random_state import random_state, restore_random_state, seed_everything
from nemo_lmpo.config.schema import CheckpointConfig, ModelConfig
from nemo_lmpo.errors import TrainingError
from nemo_lmpo.parallel.groups import create_groups, destroy_groups, start_process_group
from nemo_lmpo.runtime.cpu_adapter import on_cpu
from nemo_lmpo.runtime.launch import LaunchInfo


@pytest.fixture(autouse=True, scope="module")
def one_process() -> Iterator[None]:
    with on_cpu():
        start_process_group(LaunchInfo(), use_cuda=False)
        try:
            create_groups(ModelConfig())
            yield
        finally:
            destroy_groups()


class Holder:
    """A state of one tensor."""

    def __init__(self, root: Path, *, size: int = 4, sidecars: Any = None, **options: Any) -> None:
        self.value = torch.zeros(size)
        self.manager = CheckpointManager(
            root,
            CheckpointConfig(**options),
            make_state=self._state,
            load_state=self._load,
            write_sidecars=sidecars or (lambda directory: None),
            state_bytes=4 * size,
            layout={"tensor": 1},
        )

    def _state(self, is_loading: bool) -> dict[str, Any]:
        from megatron.core.dist_checkpointing import ShardedTensor

        return {"value": ShardedTensor.from_rank_offsets("value", self.value)}

    def _load(self, state: dict[str, Any], progress: TrainState) -> None:
        self.value = state["value"].clone()

    def save(self, step: int, **metrics: float) -> None:
        self.value.fill_(step)
        self.manager.save(TrainState(step=step, metrics=metrics))


@pytest.mark.parametrize(
    ("options", "losses", "kept"),
    [
        ({"keep_last": 1, "keep_best": 0}, [1, 2, 3, 4], [4]),
        ({"keep_last": 2, "keep_best": 0}, [1, 2, 3, 4], [3, 4]),
        ({"keep_last": 1, "keep_best": 1}, [2, 1, 3, 4], [2, 4]),
        ({"keep_last": 1, "keep_best": 2}, [2, 1, 3, 4], [1, 2, 4]),
        ({"keep_last": 1, "keep_best": 1, "mode": "max"}, [2, 1, 3, 2], [3, 4]),
        ({"keep_last": 1, "keep_best": 1}, [float("nan"), 3, 2, 4], [3, 4]),
        ({"keep_last": 1, "keep_best": 1, "monitor": "val/other"}, [1, 2, 3, 4], [4]),
    ],
)
def test_newest_and_best_are_kept(options: dict, losses: list[float], kept: list[int], tmp_path: Path) -> None:
    holder = Holder(tmp_path, **options)
    for step, loss in enumerate(losses, 1):
        holder.save(step, **{"val/loss": float(loss)})
    assert saved_steps(tmp_path) == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step:07d}" for step in kept]


def test_loads_the_newest(tmp_path: Path) -> None:
    holder = Holder(tmp_path)
    for step in (1, 2):
        holder.save(step, loss=0.5 * step)
    other = Holder(tmp_path)
    progress = other.manager.load_newest()
    assert (progress.step, progress.metrics, progress.layout) == (2, {"loss": 1.0}, {"tensor": 1})
    assert other.value.tolist() == [2.0] * 4


def test_nothing_to_load_is_a_new_run(tmp_path: Path) -> None:
    assert Holder(tmp_path / "none").manager.load_newest() == TrainState()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Same size, other content."""
    path.write_bytes(bytes(byte ^ 0xFF for byte in path.read_bytes()))


def part(directory: Path, pattern: str) -> Path:
    return next(directory.glob(pattern))


DAMAGE = {
    "manifest_gone": lambda d: (d / "manifest.json").unlink(),
    "manifest_cut": lambda d: cut(d / "manifest.json"),
    "manifest_of_another_kind": lambda d: (d / "manifest.json").write_text("[]"),
    "manifest_not_text": lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe"),
    "data_gone": lambda d: part(d, "state/*.distcp").unlink(),
    "data_cut": lambda d: cut(part(d, "state/*.distcp")),
    "progress_gone": lambda d: (d / "progress.json").unlink(),
    "progress_garbled": lambda d: flip(d / "progress.json"),
    "metadata_garbled": lambda d: flip(d / "state/.metadata"),
    "data_garbled": lambda d: flip(part(d, "state/*.distcp")),
    "state_gone": lambda d: shutil.rmtree(d / "state"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_named_and_the_one_before_is_used(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    holder = Holder(tmp_path)
    for step in (1, 2):
        holder.save(step)
    DAMAGE[damage](step_directory(tmp_path, 2))
    other = Holder(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert other.manager.load_newest().step == 1
    assert other.value.tolist() == [1.0] * 4
    messages = [record.getMessage() for record in caplog.records if "is damaged" in record.getMessage()]
    assert len(messages) == 1
    assert "step_0000002" in messages[0]
    assert "\n" not in messages[0], "one line a message"
    other.save(2)  # and the run writes over it
    assert find_damage(step_directory(tmp_path, 2)) is None


def test_what_an_interrupted_save_leaves_is_removed(tmp_path: Path) -> None:
    holder = Holder(tmp_path)
    holder.save(1)
    shutil.copytree(step_directory(tmp_path, 1), tmp_path / "step_0000002.tmp")
    shutil.copytree(step_directory(tmp_path, 1), tmp_path / "step_0000000.deleted")
    (tmp_path / "notes.tmp").mkdir()  # not ours
    assert holder.manager.load_newest().step == 1
    holder.manager.clean()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.tmp", "step_0000001"]


def test_too_little_disk_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = Holder(tmp_path)
    holder.save(1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda path: usage(100, 90, 15))
    with pytest.raises(TrainingError, match=r"step_0000002 could not be written .*a checkpoint needs"):
        holder.save(2)
    assert saved_steps(tmp_path) == [1]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_disk_that_fills_while_companions_are_written(tmp_path: Path) -> None:
    def full(directory: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    Holder(tmp_path).save(1)
    with pytest.raises(TrainingError) as caught:
        Holder(tmp_path, sidecars=full).save(2)
    message = str(caught.value)
    assert "No space left on device" in message
    assert "older ones are untouched: free the disk and repeat the command" in message
    assert saved_steps(tmp_path) == [1]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_disk_that_fills_while_tensors_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one of 1 MiB, which megatron-core's writer processes fill."""
    root = tmp_path / "small"
    root.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(root)], capture_output=True).returncode:
        pytest.skip("a small file system can only be mounted by root")
    try:
        holder = Holder(root, size=100_000)  # 400 kB: one fits, the others do not
        holder.save(1)
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda path: usage(10**9, 0, 10**9))
        filler = root / "filler"
        filler.write_bytes(b"0" * 400_000)
        with pytest.raises(TrainingError, match=r"step_0000002 could not be written") as caught:
            holder.save(2)
        assert "older ones are untouched" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert saved_steps(root) == [1]
        assert not list(root.glob("*.tmp"))
        other = Holder(root, size=100_000)
        assert other.manager.load_newest().step == 1
        assert (other.value == 1).all()
        filler.unlink()
        holder.save(2)  # room again
        assert saved_steps(root) == [1, 2]
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)


def test_background_saving_becomes_visible_when_it_is_whole(tmp_path: Path) -> None:
    holder = Holder(tmp_path, async_save=True)
    holder.save(1)
    holder.manager.wait()
    assert saved_steps(tmp_path) == [1]
    assert find_damage(step_directory(tmp_path, 1)) is None
    other = Holder(tmp_path)
    assert other.manager.load_newest().step == 1
    assert other.value.tolist() == [1.0] * 4


def test_progress_survives_as_it_is(tmp_path: Path) -> None:
    holder = Holder(tmp_path)
    statistics = {"kind": "ema", "mean": 0.1 + 0.2, "mean_count": 3, "spread": 1e-17, "spread_count": 3}
    holder.manager.save(TrainState(step=3, statistics=statistics, metrics={"loss": 1 / 3}, save_seconds=1.5))
    progress = Holder(tmp_path).manager.load_newest()
    assert progress.statistics == statistics
    assert progress.metrics == {"loss": 1 / 3}
    assert progress.save_seconds == 1.5
    assert json.loads((step_directory(tmp_path, 3) / "progress.json").read_text())["step"] == 3


def test_random_states_round_trip() -> None:
    seed_everything(5)
    state = random_state()
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(1))]
    restore_random_state(state)
    assert [random.random(), float(np.random.rand()), float(torch.rand(1))] == drawn
