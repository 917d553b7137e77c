"""Damaged checkpoints, alone and beside an older one: none is silently wrong, and none gives a traceback.

Whatever is done to a checkpoint's files, a resume goes on from the state that was saved there (the damage does not
matter), or from that of the older checkpoint, or ends with one line and leaves everything as it was. A short slice of
this is in tests/unit/checkpoint.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.checkpoint.manifest import write_manifest
from nemo_lmpo.errors import CheckpointError, DataError
from nemo_lmpo.runtime.run_files import step_directory
from tests.unit.checkpoint.runs import content, fingerprint, one_process, open_session, train

Damage = Callable[[bytearray, random.Random], None]


def flip_a_bit(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def zero_a_block(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def grow(data: bytearray, rng: random.Random) -> None:
    data += rng.randbytes(rng.randrange(1, 5000))


def swap_two_bytes(data: bytearray, rng: random.Random) -> None:
    first, second = rng.randrange(len(data)), rng.randrange(len(data))
    data[first], data[second] = data[second], data[first]


DAMAGE: tuple[Damage, ...] = (flip_a_bit, flip_a_bit, zero_a_block, cut, grow, swap_two_bytes)
EDITS: dict[str, Any] = {
    "step": [8, -3, 0, None, "3", 2.5, True],
    "statistics": [None, {}, {"mean": "x"}, [], {"kind": "ema"}],
    "metrics": [None, {"loss": "low"}],
    "layout": [{}, {"tensor": "two"}, None],
    "save_seconds": [-1, "long"],
    "version": [0, 99, "2", None],
    "data": [{"train": 5}, {"train": "other"}],
}


@pytest.fixture(scope="module")
def place() -> Iterator[Any]:
    with one_process() as place:
        yield place


@pytest.fixture(scope="module")
def trained(place: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str]]:
    run = tmp_path_factory.mktemp("trained") / "run"
    prints = {step: fingerprint(train(place, run, f"trainer.max_steps={step}")) for step in (2, 3)}
    shutil.rmtree(step_directory(run / "checkpoints", 1))
    return run, prints


def cases(directory: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Names of damages, and what does them to a checkpoint's directory."""
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    for name in names:
        yield f"{name} gone", partial(_remove, name=name)
        for number, damage in enumerate(DAMAGE):
            yield f"{name} {damage.__name__} {number}", partial(_damage, name=name, seed=number)
    for key, values in EDITS.items():
        for value in values:
            yield f"{key}={value!r}", partial(_edit, key=key, value=value)


def _remove(directory: Path, name: str) -> None:
    (directory / name).unlink()


def _damage(directory: Path, name: str, seed: int) -> None:
    """Do to a file what the damage of that number does."""
    path = directory / name
    data = bytearray(path.read_bytes())
    DAMAGE[seed](data, random.Random(f"{path.name}{seed}"))
    path.write_bytes(data)


def _edit(directory: Path, key: str, value: Any) -> None:
    """Change a field of progress.json, with a manifest that fits: no bad disk, but somebody's hand."""
    path = directory / "progress.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    write_manifest(directory)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("beside", ["alone", "beside_an_older_one"])
def test_none_is_silently_wrong(beside: str, place: Any, trained: tuple[Path, dict[int, str]], tmp_path: Path) -> None:
    source, prints = trained
    session = open_session(place, tmp_path / "session")
    start = fingerprint(session)
    tried = 0
    for name, damage in cases(step_directory(source / "checkpoints", 3)):
        root = tmp_path / "checkpoints"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(source / "checkpoints", root)
        if beside == "alone":
            shutil.rmtree(step_directory(root, 2))
        damage(step_directory(root, 3))
        before = content(root)
        session.checkpoints.root = root
        tried, message = tried + 1, ""
        try:
            step = session.checkpoints.load_newest().step
        except (CheckpointError, DataError) as error:
            message = str(error)
            step = None
        if step is None:
            assert "\n" not in message, name
            assert content(root) == before, name
            continue
        assert step in (2, 3), name
        assert fingerprint(session) == prints[step], name
        if step == 2:
            assert (root / "step_0000003.damaged").exists(), name
    assert tried > 65
    assert start != prints[3]
