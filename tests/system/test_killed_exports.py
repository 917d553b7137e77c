"""A conversion that is killed at any point: its output is whole or as before, and the same command completes it."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.export.write import export_run
from nemo_lmpo.formats import outputs
from nemo_lmpo.formats.conversion import plan, renew_side_files, write_huggingface, write_nemo
from nemo_lmpo.formats.export_record import RECORD, write_record
from nemo_lmpo.formats.model_files import open_model
from nemo_lmpo.formats.outputs import check_output
from tests.unit.checkpoint.runs import content
from tests.unit.formats import tiny_models as tiny

RUN = Path(__file__).parents[1] / "assets" / "written_by_a3f51bc" / "run"
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
            plain, counted_open = io.open, counted(io.open)
            vars(io)["open"] = lambda file, mode="r", *more, **keywords: (
                plain if mode in ("r", "rb") else counted_open
            )(file, mode, *more, **keywords)
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


CONVERSIONS = [*((case, True) for case in CASES), ("over Hugging Face", False)]


@pytest.mark.parametrize(("case", "exchange"), CONVERSIONS)
def test_a_kill_at_any_point_leaves_a_whole_output_or_the_old_one(
    case: str, exchange: bool, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(outputs, "_exchange", lambda first, second: False)
    kill_conversions(case, models, tmp_path / "place", stride=CASES[case][3], exchange=exchange)


def kill_conversions(
    case: str, models: dict[str, Path], folder: Path, *, stride: int, exchange: bool, every: bool = False
) -> None:
    """Kill a conversion at every ``stride``-th operation on files."""
    given, name, there, _ = CASES[case]
    output = folder / name

    def work() -> None:
        conversion = plan(open_model(models[given]), output)
        conversion.check([models[given]], overwrite=there is not None)
        (write_nemo if given == "hf" else write_huggingface)(conversion, overwrite=there is not None)

    def begin() -> None:
        folder.mkdir()
        if there is not None:
            copied(models[there], output)

    before = None if there is None else state(models[there])
    kill(work, begin, output, before, stride=stride, exchange=exchange, repeats=there is not None, every=every)


def kill(
    work: Callable[[], object],
    begin: Callable[[], None],
    output: Path,
    before: object,
    *,
    stride: int,
    exchange: bool = True,
    repeats: bool = True,
    every: bool = False,
) -> int:
    """Kill ``work`` at every ``stride``-th operation on files; returns how many operations there are.

    Args:
        work: makes ``output``.
        begin: makes its directory anew.
        output: is whole or as ``before`` after each kill, and whole after the same work again.
        before: content of the output then; None: there is none.
        stride: 1 for every operation.
        exchange: whether names can be exchanged in one step here.
        repeats: whether the work may be done again over its own output.
        every: do the work again after each kill, also where an earlier one left the same.
    """
    folder = output.parent
    begin()
    beside = {path.name for path in folder.iterdir()} | {output.name}
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
        if found is None and before is not None:
            hidden += 1
            assert not exchange, "the old output is gone and the new one is not there"
            check_output(output, [], overwrite=True)  # any command to the same place brings it back
            assert state(output) == before
        else:
            assert found in (before, whole), f"half an output at point {point}"
        if found == whole and not repeats:
            assert not killed or {path.name for path in folder.iterdir()} == beside
            continue
        left = (found == whole, *sorted(path.suffix for path in folder.iterdir()))
        if left in seen and point % 5 and not every:  # a process that was killed a moment later leaves the same
            continue
        seen.add(left)
        work()
        assert state(output) == whole
        assert {path.name for path in folder.iterdir()} == beside
    assert point > 3
    assert hidden <= 1
    return point


def kill_an_export(folder: Path, *, stride: int, every: bool = False) -> int:
    """Kill the export of a run, its card and pictures included; and once more where the weights are there already."""

    def begin() -> None:
        copied(RUN, folder)

    return kill(lambda: export_run(folder), begin, folder / "huggingface", None, stride=stride, every=every)


def test_a_killed_export_of_a_run_is_completed_by_the_same_command(tmp_path: Path) -> None:
    assert kill_an_export(tmp_path / "run", stride=31) > 40


@pytest.mark.parametrize("recorded", [True, False])
def test_a_kill_while_side_files_are_renewed(recorded: bool, models: dict[str, Path], tmp_path: Path) -> None:
    """What is there is as before, as today, or refused; the same command gives that of today."""
    output = tmp_path / "place" / "out"
    output.parent.mkdir()
    conversion = plan(open_model(models["hf"]), output)
    write_huggingface(conversion)
    today = state(output)
    earlier = {
        "generation_config.json": b'{"eos_token_id": 1}',
        "chat_template.jinja": b"of an earlier version",
        **({"added_tokens.json": b"{}"} if recorded else {}),  # which is not written today
    }
    for name, said in earlier.items():
        (output / name).write_bytes(said)
    changed = json.loads((output / "config.json").read_bytes())
    (output / "config.json").write_text(json.dumps(changed))
    write_record(output)
    if not recorded:  # as versions before the record left it
        (output / RECORD).unlink()
    before = content(output)
    assert isinstance(today, dict)
    assert set(before) ^ set(today) == {"added_tokens.json" if recorded else RECORD}
    point, refused, killed = 0, 0, True
    while killed:
        point += 1
        clear(output)
        output.mkdir()
        for name, said in before.items():
            (output / name).write_bytes(said)
        killed = killed_at(point, lambda: renew_side_files(conversion))
        found = content(output)
        if {name: said for name, said in found.items() if not name.endswith(".tmp")} in (before, today):
            open_model(output)
        else:
            refused += 1
            with pytest.raises(CheckpointError, match="is not what was written there"):
                open_model(output)
        renew_side_files(conversion)
        assert state(output) == today
    assert point > 8
    assert refused > 3


def clear(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
