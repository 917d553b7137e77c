"""A checkpoint that somebody else wrote: whatever its small files name or hold, looking at it ends in one sentence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.checkpoint.manifest import _own_checksum, find_damage
from nemo_lmpo.runtime.run_files import step_directory
from tests.unit.checkpoint.runs import one_process, train

Content = dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("saved") / "run"
    with one_process() as place:
        train(place, run, "trainer.max_steps=1")
    return step_directory(run / "checkpoints", 1)


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def rewrite(checkpoint: Path, change: Callable[[Content], object]) -> None:
    """A manifest whose own checksum is right."""
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    content["checksum"] = _own_checksum(content)
    path.write_text(json.dumps(content))


def naming(name: str, size: object = 0) -> Callable[[Content], object]:
    def change(content: Content) -> None:
        content["files"][name] = size
        content["checksums"][name] = "0" * 32

    return change


@pytest.mark.parametrize("content", [True, False])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (naming("/dev/zero"), "manifest.json names '/dev/zero', which is not a file of a checkpoint"),
        (naming("../../../dev/zero"), "names '../../../dev/zero'"),
        (naming("state/../../x"), "names 'state/../../x'"),
        (naming(""), "names ''"),
        (naming("a\0b"), r"names 'a\x00b'"),
        (naming("a\ud800"), r"names 'a\ud800'"),
        (naming("a\r\x1b[2Jb"), "is missing"),
        (naming("x" * 5000), "cannot be read"),
        (naming("fifo"), "fifo is not a regular file"),
        (naming("zero"), "zero is not a regular file"),
        (naming("state"), "state is not a regular file"),
        (naming("loop"), "loop cannot be read"),
        (naming("progress.json", [[[]]]), "bytes instead of [[[]]]"),
        (lambda content: content.update(checksums=[1]), "manifest.json is not readable"),
        (lambda content: content.update(files={}), "does not list progress.json"),
        (lambda content: content.update(version=[10**50]), "its version is [1000"),
        (lambda content: content.pop("files"), "manifest.json"),
    ],
)
def test_odd_manifests(checkpoint: Path, change: Callable[[Content], object], told: str, content: bool) -> None:
    os.mkfifo(checkpoint / "fifo")
    (checkpoint / "zero").symlink_to("/dev/zero")
    (checkpoint / "loop").symlink_to("loop")
    rewrite(checkpoint, change)
    found = find_damage(checkpoint, content=content)
    assert found is not None
    assert told in found
    assert found.isprintable()
    assert len(found) < 500


@pytest.mark.parametrize("name", ["manifest.json", "progress.json", "state/common.pt", "state/.metadata"])
@pytest.mark.parametrize("kind", ["fifo", "device", "deep", "huge number"])
def test_odd_small_files(checkpoint: Path, name: str, kind: str) -> None:
    path = checkpoint / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_text("[" * 100_000 if kind == "deep" else '{"version": ' + "9" * 5000 + "}")
    if name != "manifest.json":  # sizes that the manifest tells are right
        rewrite(checkpoint, lambda content: content["files"].update({name: path.stat().st_size}))
    found = find_damage(checkpoint, content=False)
    assert found is not None
    assert found.isprintable()
    assert len(found) < 500


def test_a_state_that_names_files_elsewhere(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nemo_lmpo.checkpoint.manifest as manifest

    module: Any = manifest
    read = module.state_metadata

    def elsewhere(*arguments: Any) -> Any:
        metadata = read(*arguments)
        next(iter(metadata.storage_data.values())).relative_path = "../../../etc/passwd"
        return metadata

    monkeypatch.setattr(module, "state_metadata", elsewhere)
    assert find_damage(checkpoint) == ("state/.metadata names '../../../etc/passwd', which manifest.json does not list")
