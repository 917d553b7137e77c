"""A conversion that is killed at any point: its output is whole or as before, and the same command completes it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.formats import outputs
from nemo_lmpo.formats.conversion import plan, write_huggingface, write_nemo
from nemo_lmpo.formats.model_files import open_model
from nemo_lmpo.formats.outputs import check_output
from tests.unit.checkpoint.runs import content
from tests.unit.formats import tiny_models as tiny

CALLS = ("fsync", "mkdir", "rename", "replace", "link", "unlink", "rmdir")
KILLED = 9


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    tiny.save("llama2", root / "hf")
    write_nemo(plan(open_model(root / "hf"), root / "x.nemo"))
    tiny.save("smollm2", root / "other")
    write_huggingface(plan(open_model(root / "other"), root / "other_hf"))
    write_nemo(plan(open_model(root / "other"), root / "other.nemo"))
    return {path.name: path for path in root.iterdir()}


def killed_at(point: int, work: Callable[[], object]) -> bool:
    """Do the work in another process, which ends without a word at its so manieth call that changes the disk."""
    child = os.fork()
    if child == 0:
        calls = 0

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def count(*arguments: Any, **keywords: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == point:
                    os._exit(KILLED)
                return call(*arguments, **keywords)

            return count

        try:
            for name in CALLS:
                setattr(os, name, counted(getattr(os, name)))
            outputs._exchange = counted(outputs._exchange)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED)
    return code == KILLED


def state(path: Path) -> dict[str, bytes] | bytes | None:
    if not path.exists():
        return None
    return content(path) if path.is_dir() else path.read_bytes()


def copied(source: Path, target: Path) -> None:
    if source.is_dir():
        for name, data in content(source).items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(data)
    else:
        target.write_bytes(source.read_bytes())


CASES = {
    # name: input, output, what was there before, and every which call is killed at
    "over an archive": ("hf", "out.nemo", "other.nemo", 1),
    "to a tree": ("hf", "out", None, 4),
    "to Hugging Face": ("x.nemo", "out", None, 2),
    "over Hugging Face": ("x.nemo", "out", "other_hf", 1),
    "over an archive by a tree": ("hf", "out", "other.nemo", 4),
}


@pytest.mark.parametrize(("case", "exchange"), [*((case, True) for case in CASES), ("over Hugging Face", False)])
def test_a_kill_at_any_point_leaves_a_whole_output_or_the_old_one(
    case: str, exchange: bool, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, name, there, stride = CASES[case]
    if not exchange:
        monkeypatch.setattr(outputs, "_exchange", lambda first, second: False)
    folder = tmp_path / "place"
    output = folder / name
    before = None if there is None else state(models[there])

    def work() -> None:
        conversion = plan(open_model(models[given]), output)
        conversion.check([models[given]], overwrite=there is not None)
        (write_nemo if given == "hf" else write_huggingface)(conversion, overwrite=there is not None)

    def begin() -> None:
        folder.mkdir()
        if there is not None:
            copied(models[there], output)

    begin()
    work()
    whole = state(output)
    point, hidden = 1 - stride, 0
    seen: set[tuple[object, ...]] = set()
    killed = True
    while killed:
        point += stride
        clear(folder)
        begin()
        killed = killed_at(point, work)
        found = state(output)
        if found is None and there is not None:
            hidden += 1
            assert not exchange, "the old output is gone and the new one is not there"
            check_output(output, [], overwrite=True)  # any command to the same place brings it back
            assert state(output) == before
        else:
            assert found in (before, whole), f"half an output at point {point}"
        if found == whole and there is None:
            assert not killed or [path.name for path in folder.iterdir()] == [name]
            continue
        left = (found == whole, *sorted(path.suffix for path in folder.iterdir()))
        if left in seen and point % 5:  # a process that was killed a moment later leaves the same
            continue
        seen.add(left)
        work()
        assert state(output) == whole
        assert [path.name for path in folder.iterdir()] == [name]
    assert point > 3
    assert hidden <= 1


def clear(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
