"""Checkpoints of real runs: which are kept, which are loaded, what damage, faults and a full disk leave."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import random
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_lmpo.checkpoint.background import saves_in_background
from nemo_lmpo.checkpoint.manifest import find_damage, write_manifest
from nemo_lmpo.checkpoint.progress import Progress
from nemo_lmpo.checkpoint.random_state import random_state, restore_random_state, seed_everything
from nemo_lmpo.config.rules import ParallelLayout
from nemo_lmpo.errors import CheckpointError, DataError, TrainingError
from nemo_lmpo.formats.distributed_reader import state_metadata
from nemo_lmpo.runtime.files import file_checksum
from nemo_lmpo.runtime.run_files import saved_steps, step_directory
from nemo_lmpo.training.saving_costs import SavingCosts
from nemo_lmpo.training.session import TrainingSession
from tests.unit.checkpoint.runs import content, fingerprint, one_process, open_session, train

usage = namedtuple("usage", "total used free")


@pytest.fixture(autouse=True, scope="module")
def place() -> Iterator[Any]:
    with one_process() as place:
        yield place


@pytest.fixture(scope="module")
def trained(place: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str]]:
    """A finished run of 3 steps, a checkpoint each, and the fingerprint of what was saved at each step."""
    run = tmp_path_factory.mktemp("trained") / "run"
    prints = {}
    for step in (1, 2, 3):
        prints[step] = fingerprint(train(place, run, f"trainer.max_steps={step}"))
    return run, prints


@pytest.fixture
def run(trained: tuple[Path, dict[int, str]], tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


def going_on(place: Any, run: Path, *overrides: str, root: Path | None = None) -> TrainingSession:
    """A session after it resumed ``run``, so that its optimizer has moments to save; it saves to ``root``."""
    session = open_session(place, run, *overrides)
    session.checkpoints.load_newest()
    session.checkpoints.root = root or session.checkpoints.root
    return session


def save(session: TrainingSession, step: int, **metrics: float) -> None:
    statistics = session.policy.statistics
    assert statistics is not None
    session.checkpoints.save(Progress(step=step, metrics=metrics, statistics=statistics.state_dict()))


@pytest.mark.parametrize(
    ("options", "losses", "kept"),
    [
        ({"keep_last": 1, "keep_best": 0}, [1, 2, 3, 4], [4]),
        ({"keep_last": 2, "keep_best": 0}, [1, 2, 3, 4], [3, 4]),
        ({"keep_last": 1, "keep_best": 1}, [2, 1, 3, 4], [2, 4]),
        ({"keep_last": 1, "keep_best": 2}, [2, 1, 3, 4], [1, 2, 4]),
        ({"keep_last": 1, "keep_best": 1, "mode": "max"}, [2, 1, 3, 2], [3, 4]),
        ({"keep_last": 1, "keep_best": 1}, [float("nan"), 3, 2, 4], [3, 4]),
        ({"keep_last": 1, "keep_best": 1, "monitor": "val/rewards/margins"}, [1, 2, 3, 4], [4]),
    ],
)
def test_newest_and_best_are_kept(
    options: dict[str, Any], losses: list[float], kept: list[int], place: Any, run: Path, tmp_path: Path
) -> None:
    settings = [f"checkpoint.{name}={value}" for name, value in options.items()]
    session = going_on(place, run, *settings, root=tmp_path / "checkpoints")
    for step, loss in enumerate(losses, 1):
        save(session, step, **{"val/loss": float(loss)})
    assert saved_steps(tmp_path / "checkpoints") == kept
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"step_{n:07d}" for n in kept]


def test_only_whole_checkpoints_count_and_the_new_one_stays(place: Any, run: Path) -> None:
    """A damaged one takes no place of `keep_last`, and one of a later step does not push the new one out."""
    root = run / "checkpoints"
    session = going_on(place, run, "checkpoint.keep_last=2", "checkpoint.keep_best=0")
    cut(step_directory(root, 2) / "progress.json")
    step_directory(root, 3).rename(step_directory(root, 9))
    save(session, 4)
    assert saved_steps(root) == [1, 2, 4, 9]
    save(session, 5)
    assert saved_steps(root) == [2, 4, 5, 9], "1 was the third newest whole one; 2 is damaged, 9 of another run"


def test_loads_what_was_saved(place: Any, trained: tuple[Path, dict[int, str]], run: Path) -> None:
    session = open_session(place, run)
    assert fingerprint(session) != trained[1][3]
    progress = session.checkpoints.load_newest()
    assert progress.step == 3
    assert fingerprint(session) == trained[1][3]


def test_a_small_share_has_one_writer_and_a_large_one_two(
    place: Any, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files(step: int) -> list[str]:
        return sorted(path.name for path in (step_directory(run / "checkpoints", step) / "state").glob("*.distcp"))

    session = going_on(place, run)
    share = sum(p.numel() for p in session.policy.models[0].parameters()) * 12  # float32 weights, two moments
    monkeypatch.setattr("nemo_lmpo.checkpoint.writers.WORTH_TWO_WRITERS", 1.1 * share)
    save(session, 4)
    assert files(4) == ["__0_0.distcp"]
    monkeypatch.setattr("nemo_lmpo.checkpoint.writers.WORTH_TWO_WRITERS", 0.9 * share)
    save(session, 5)
    assert files(5) == ["__0_0.distcp", "__0_1.distcp"]
    other = open_session(place, run)
    assert other.checkpoints.load_newest().step == 5
    assert fingerprint(other, counts=False) == fingerprint(session, counts=False)


def test_nothing_to_load_is_a_new_run(place: Any, tmp_path: Path) -> None:
    assert open_session(place, tmp_path).checkpoints.load_newest() == Progress()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Same size, other content."""
    path.write_bytes(bytes(byte ^ 0xFF for byte in path.read_bytes()))


def edit(directory: Path, **values: Any) -> None:
    """Change progress.json, and let the manifest say so: an edit by someone who means it."""
    path = directory / "progress.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    write_manifest(directory)


def take(directory: Path, name: str) -> None:
    """Replace a file or folder by that of the checkpoint before, manifest included."""
    source = step_directory(directory.parent, 2) / name
    if source.is_dir():
        shutil.rmtree(directory / name)
        shutil.copytree(source, directory / name)
    else:
        shutil.copyfile(source, directory / name)
    write_manifest(directory)


def become_a_file(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.write_text("")


def become_a_circle(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.symlink_to(directory)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "manifest_gone": lambda d: (d / "manifest.json").unlink(),
    "manifest_not_text": lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe"),
    "data_gone": lambda d: (d / "state/__0_0.distcp").unlink(),
    "data_garbled": lambda d: flip(max((d / "state").glob("*.distcp"))),
    "progress_of_another_step": lambda d: edit(d, step=8),
    "progress_of_a_senseless_step": lambda d: edit(d, step=-3),
    "progress_a_list": lambda d: (d / "progress.json").write_text("[]"),
    "field_of_nobody": lambda d: edit(d, colour="red"),
    "statistics_gone": lambda d: edit(d, statistics=None),
    "statistics_no_numbers": lambda d: edit(d, statistics={"mean": "x"}),
    "state_of_another_step": lambda d: take(d, "state"),
    "progress_of_the_one_before": lambda d: take(d, "progress.json"),
    "a_file": become_a_file,
    "a_circle_of_links": become_a_circle,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_set_aside_and_the_one_before_is_used(
    damage: str, place: Any, trained: tuple[Path, dict[int, str]], run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGE[damage](step_directory(run / "checkpoints", 3))
    session = open_session(place, run)
    with caplog.at_level(logging.WARNING):
        assert session.checkpoints.load_newest().step == 2
    assert fingerprint(session) == trained[1][2]
    (message,) = [record.getMessage() for record in caplog.records if "is damaged" in record.getMessage()]
    assert "step_0000003.damaged" in message
    assert "\n" not in message, "one line a message"
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step_0000001", "step_0000002", "step_0000003.damaged"]


@pytest.mark.parametrize("damage", ["data_garbled", "statistics_no_numbers", "a_circle_of_links"])
def test_where_none_is_whole_nothing_starts_and_nothing_changes(damage: str, place: Any, run: Path) -> None:
    root = run / "checkpoints"
    DAMAGE[damage](step_directory(root, 3))
    for step in (1, 2):
        shutil.rmtree(step_directory(root, step))
    session = open_session(place, run)
    before, start = content(run), fingerprint(session)
    with pytest.raises(CheckpointError) as caught:
        session.train(0.0)
    message = str(caught.value)
    assert "step_0000003" in message
    assert "restore one of them, or set checkpoint.resume=false" in message
    assert "\n" not in message
    assert content(run) == before
    assert fingerprint(session) == start, "nothing of it was loaded"


def test_a_bit_in_any_file_is_noticed(run: Path) -> None:
    directory = step_directory(run / "checkpoints", 3)
    rng = random.Random(3)
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for place in {0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(20))}:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            assert find_damage(directory) is not None, (path.name, place)
        path.write_bytes(whole)
    assert find_damage(directory) is None


def test_sizes_only_when_asked_for(run: Path) -> None:
    directory = step_directory(run / "checkpoints", 3)
    flip(directory / "state" / "__0_0.distcp")
    assert find_damage(directory, content=False) is None
    assert find_damage(directory) == "state/__0_0.distcp has another checksum than when it was written"


def test_a_newer_version_is_named(place: Any, run: Path) -> None:
    directory = step_directory(run / "checkpoints", 3)
    edit(directory, version=3, invention=1)
    before = content(run / "checkpoints")
    with pytest.raises(CheckpointError, match=r"step_0000003 has format 3, .* reads up to 2; update nemo_lmpo"):
        open_session(place, run).checkpoints.load_newest()
    assert content(run / "checkpoints") == before


FAULTS = {
    "gpu_memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "network": RuntimeError("NCCL error: unhandled system error"),
    "key": KeyError("decoder.layers.7"),
    "disk": OSError(errno.EIO, "Input/output error"),
}


@pytest.mark.parametrize("moment", ["reading", "after_weights"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_damage_ends_the_run(
    fault: str, moment: str, place: Any, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst fault there was: such an error counted as damage, and training began anew on half-loaded weights."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise FAULTS[fault]

    session = open_session(place, run)
    before = content(run)
    if moment == "reading":
        monkeypatch.setattr("megatron.core.dist_checkpointing.load", fail)
    else:
        monkeypatch.setattr("nemo_lmpo.training.session.load_optimizer_state", fail)
    with pytest.raises(TrainingError) as caught:
        session.train(0.0)
    message = str(caught.value)
    assert "step_0000003 could not be loaded" in message
    assert str(FAULTS[fault]).splitlines()[0] in message
    assert "nothing was changed" in message
    assert content(run) == before


def test_no_file_handles_left_is_no_damage(place: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(place, run)

    def none_left(path: Path) -> str:
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr("nemo_lmpo.checkpoint.manifest.file_checksum", none_left)
    with pytest.raises(TrainingError, match=r"step_0000003 could not be looked at \(Too many open files\)"):
        session.checkpoints.load_newest()
    assert saved_steps(run / "checkpoints") == [1, 2, 3]


def test_no_kernels_own_states_are_kept(place: Any, run: Path) -> None:
    """Layers of other kernels have extra states that these have not; a checkpoint must load into them and back."""
    state = step_directory(run / "checkpoints", 3) / "state"
    assert not [key for key in state_metadata(state).state_dict_metadata if "_extra_state" in key]
    session = open_session(place, run)

    class WithExtraState(type(session.policy.models[0].decoder.final_layernorm)):  # type: ignore[misc]
        def get_extra_state(self) -> torch.Tensor:
            return torch.zeros(1)

        def set_extra_state(self, state: Any) -> None:
            raise AssertionError("none was saved")

    session.policy.models[0].decoder.final_layernorm.__class__ = WithExtraState
    assert any("_extra_state" in key for key in session.policy.models[0].state_dict())
    assert session.checkpoints.load_newest().step == 3
    save(session, 4)
    other = open_session(place, run)
    assert other.checkpoints.load_newest().step == 4
    assert fingerprint(other, counts=False) == fingerprint(session, counts=False)


def write_pairs(path: Path, count: int, *, first: str = "a b") -> None:
    rows = [
        {"prompt": f"sort {'b ' * (n % 7)}a", "chosen": first if n == 0 else "a b", "rejected": "b a"}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_data_that_changed_is_refused_unless_admitted(place: Any, tmp_path: Path) -> None:
    pairs, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    data = (f"data.train.path={pairs}", "data.train.limit=null")
    write_pairs(pairs, 16)
    first = train(place, run, *data, "trainer.max_steps=1")
    write_pairs(pairs, 16, first="a a b")
    changed = open_session(place, run, *data)
    with pytest.raises(DataError) as caught:
        changed.checkpoints.load_newest()
    message = str(caught.value)
    assert f"data.train.path={pairs} holds other pairs" in message
    assert first.fingerprints["train"] in message
    assert changed.fingerprints["train"] in message
    assert saved_steps(run / "checkpoints") == [1]
    admitted = open_session(place, run, *data, "checkpoint.allow_changes=[data.train.path]")
    assert admitted.checkpoints.load_newest().step == 1
    write_pairs(pairs, 16)
    assert open_session(place, run, *data).checkpoints.load_newest().step == 1


def test_what_an_interrupted_save_leaves_is_removed(place: Any, run: Path) -> None:
    root = run / "checkpoints"
    shutil.copytree(step_directory(root, 1), root / "step_0000004.tmp")
    shutil.copytree(step_directory(root, 1), root / "step_0000000.deleted")
    shutil.copytree(step_directory(root, 1), root / "step_0000005.damaged")  # to be looked at, not removed
    (root / "notes.tmp").mkdir()  # not ours
    session = open_session(place, run)
    assert session.checkpoints.load_newest().step == 3
    session.checkpoints.clean()
    kept = ["notes.tmp", "step_0000001", "step_0000002", "step_0000003", "step_0000005.damaged"]
    assert sorted(path.name for path in root.iterdir()) == kept


def test_too_little_disk_is_told_before_writing(place: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = going_on(place, run)
    session.checkpoints.state_bytes = 5 * 2**20
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 3 * 2**10))
    with pytest.raises(TrainingError) as caught:
        save(session, 4)
    message = str(caught.value)
    assert "step_0000004 could not be written: it needs 5.0 MiB, and" in message
    assert "has 3.0 KiB free" in message
    assert message.count("run the same command to resume") == 1
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step_{n:07d}" for n in (1, 2, 3)]


def test_a_disk_that_fills_while_sidecars_are_written(place: Any, run: Path) -> None:
    def full(directory: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    session = going_on(place, run)
    session.checkpoints.write_sidecars = full
    with pytest.raises(TrainingError) as caught:
        save(session, 4)
    assert "No space left on device" in str(caught.value)
    assert "older ones are untouched: free the disk and run the same command to resume" in str(caught.value)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step_{n:07d}" for n in (1, 2, 3)]


@pytest.mark.processes("mount makes a small file system")
def test_a_disk_that_fills_while_tensors_are_written(
    place: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one of 1 MiB, which the writers fill."""
    root = tmp_path / "small"
    root.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(root)], capture_output=True).returncode:
        pytest.skip("a small file system can only be mounted by root")
    try:
        session = going_on(place, run, root=root / "checkpoints")
        save(session, 1)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**9))
        filler = root / "filler"
        with pytest.raises(OSError, match="No space left"):
            filler.write_bytes(b"0" * 2**20)
        os.truncate(filler, filler.stat().st_size - 2**16)
        with pytest.raises(TrainingError, match=r"step_0000002 could not be written") as caught:
            save(session, 2)
        message = str(caught.value)
        assert "could not be written (" in message
        assert "No space left on device" in message
        assert "older ones are untouched: free the disk and run the same command to resume" in message
        assert "\n" not in message
        assert saved_steps(root / "checkpoints") == [1]
        assert not list((root / "checkpoints").glob("*.tmp"))
        assert find_damage(step_directory(root / "checkpoints", 1)) is None
        filler.unlink()
        save(session, 2)  # room again
        assert saved_steps(root / "checkpoints") == [1, 2]
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)


@pytest.mark.parametrize(
    ("wanted", "device", "free", "expected"),
    [
        ("auto", "cpu", 1e15, False),
        ("auto", "cuda", 1e15, True),
        ("auto", "cuda", 1e3, False),
        (True, "cuda", 1e3, True),
        (False, "cuda", 1e15, False),
    ],
)
def test_background_saving_is_the_default_where_a_gpus_host_has_the_memory(
    wanted: Any, device: str, free: float, expected: bool, place: Any, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(place, run, f"checkpoint.async_save={str(wanted).lower()}")
    monkeypatch.setattr("nemo_lmpo.checkpoint.background.available_bytes", lambda: free)
    layout = ParallelLayout(session.config, session.base.architecture, 1)
    assert session.config.checkpoint.async_save == wanted
    assert saves_in_background(layout, torch.device(device)) is expected
    assert session.checkpoints.in_background is (wanted is True)


@pytest.mark.parametrize("background", [False, True])
def test_what_saving_cost_is_told(background: bool, place: Any, run: Path) -> None:
    """Bytes are those of the files; training waits at least as long as it takes to write where it does not go on."""
    session = going_on(place, run, f"checkpoint.async_save={str(background).lower()}")
    costs = SavingCosts()
    save(session, 4)
    session.checkpoints.wait()
    (cost,) = session.checkpoints.costs
    state = step_directory(run / "checkpoints", 4) / "state"
    assert (cost.step, cost.in_background) == (4, background)
    assert cost.num_bytes == sum(path.stat().st_size for path in state.glob("*.distcp"))
    assert 0 < cost.writing < cost.seconds
    assert cost.held_up == session.checkpoints.held_up
    assert cost.seconds == cost.held_up + (cost.writing if background else 0)
    assert costs.count(session.checkpoints) == cost.seconds
    metrics = costs.take_metrics()
    assert metrics["checkpoint/seconds"] == cost.held_up
    assert metrics["checkpoint/gb_per_second"] == pytest.approx(cost.num_bytes / cost.writing / 1e9)
    assert 0 < metrics["checkpoint/share"] <= 1
    assert costs.take_metrics() == {}, "a save is told once"
    assert costs.facts()["bytes"] == cost.num_bytes


def test_no_data_file_is_read_by_a_save(place: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def noted(path: Path) -> str:
        read.append(path.name)
        return file_checksum(path)

    session = going_on(place, run)
    monkeypatch.setattr("nemo_lmpo.checkpoint.manifest.file_checksum", noted)
    save(session, 4)
    assert "common.pt" in read
    assert not [name for name in read if name.endswith(".distcp")]
    assert find_damage(step_directory(run / "checkpoints", 4)) is None


@pytest.mark.processes("background writers are forked")
def test_background_saving_becomes_visible_when_it_is_whole(place: Any, run: Path) -> None:
    session = going_on(place, run, "checkpoint.async_save=true")
    save(session, 4)
    session.checkpoints.wait()
    assert find_damage(step_directory(run / "checkpoints", 4)) is None
    other = open_session(place, run)
    assert other.checkpoints.load_newest().step == 4
    assert fingerprint(other, counts=False) == fingerprint(session, counts=False)


def test_progress_survives_as_it_is(place: Any, run: Path) -> None:
    statistics = {"kind": "ema", "mean": 0.1 + 0.2, "mean_count": 3, "spread": 1e-17, "spread_count": 3}
    metrics = {"loss": 1 / 3, "lmpo/std": float("nan")}
    saved = Progress(step=4, statistics=statistics, metrics=metrics, save_seconds=1.5)
    going_on(place, run).checkpoints.save(saved)
    progress = open_session(place, run).checkpoints.load_newest()
    assert repr(progress) == repr(saved), "bit for bit, not-a-number included"


def test_random_states_round_trip() -> None:
    seed_everything(5)
    state = random_state()
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(1))]
    restore_random_state(state)
    assert [random.random(), float(np.random.rand()), float(torch.rand(1))] == drawn


def test_a_gpus_random_state_is_left_alone_on_a_cpu() -> None:
    """A run that moves: the generators of the other device have states of another size."""
    seed_everything(5)
    state = {**random_state(), "cuda": torch.zeros(16, dtype=torch.uint8)}
    state["tracker"] = {name: torch.zeros(16, dtype=torch.uint8) for name in state["tracker"]}
    drawn = random.random()
    restore_random_state(state)
    assert random.random() == drawn


def test_an_engine_that_writes_no_file_of_plain_values(
    place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As megatron-core from 0.19 on: every version goes on from what is saved."""
    from megatron.core import dist_checkpointing

    ordinary, run = dist_checkpointing.save, tmp_path / "run"

    @functools.wraps(ordinary)  # ours asks for its arguments
    def save_without(state: Any, directory: str, **options: Any) -> Any:
        request = ordinary(state, directory, **options)
        (Path(directory) / "common.pt").unlink(missing_ok=True)
        return request

    monkeypatch.setattr(dist_checkpointing, "save", save_without)
    saved = fingerprint(train(place, run, "trainer.max_steps=2"))
    session = open_session(place, run, "trainer.max_steps=2")
    progress = session.checkpoints.load_newest()
    assert progress is not None
    assert (progress.step, fingerprint(session)) == (2, saved)
