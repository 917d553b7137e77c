"""`slurm status` and the report of run directories whose small files hold anything: no traceback, no hang."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_lmpo.report.read import read_facts, read_run
from nemo_lmpo.report.summary import metric_rows, settings_rows, state_text
from nemo_lmpo.runtime.batch_job import JobRecord, read_record
from nemo_lmpo.runtime.files import read_small
from nemo_lmpo.slurm.status import describe_run

ODD = [
    *(None, True, -1, 0, 10**400, 1e308, -1e308, float("nan"), float("inf"), "", "x", "7; scancel 8", "--help", "a\0b"),
    *("\x1b[31mred", "two\nlines", "ü" * 5000, "/dev/zero", [], [1], {}, {"a": [{}]}, "17_2_3", "${HOME}", "$(id)"),
]
JOB = {"job_id": "17_3", "restarts": 1, "ends_at": 5.0, "margin_seconds": 60.0, "directory": "DIR"}
STOPPED = {"step": 2, "monitor": "val/loss", "best": 1.0, "without_better": 2}
LINE = {"step": 2, "time": 1000.0, "loss": 1.5, "step_seconds": 30.0, "val/loss": 1.0}
CONFIG = {"name": "x", "trainer": {"max_steps": 5}, "checkpoint": {"monitor": "val/loss", "mode": "min"}}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("shutil.which", lambda name: None)
    path, job = tmp_path / "run", tmp_path / "job"
    path.mkdir()
    job.mkdir()
    (job / "outcome").write_text("stopped SIGTERM\n")
    write(path, "job.json", {**JOB, "directory": str(job)})
    write(path, "run.json", {"total_steps": 10})
    write(path, "config.yaml", CONFIG)
    write(path, "metrics.jsonl", LINE)
    return path


def write(run: Path, name: str, value: object) -> None:
    (run / name).write_text(json.dumps(value) + "\n")


def look_at(run: Path) -> list[str]:
    """The status line's cells, and the report's texts on the way."""
    cells = describe_run(run)
    assert len(cells) == 9
    for cell in cells:
        assert cell.isprintable(), cell
        assert len(cell) < 400, cell
    found = read_run(run)
    assert state_text(found)
    assert metric_rows(found)
    assert all(len(text) < 400 for row in settings_rows(found) for text in row)
    return cells


def test_whole_files_are_shown(run: Path) -> None:
    assert look_at(run) == [str(run), "stopped SIGTERM", "2/10", "1.5000", "1.0000", "0:04:00", "17_3", "1", "-"]


@pytest.mark.parametrize("value", ODD, ids=lambda value: ascii(value)[:20])
def test_odd_values_of_every_field(run: Path, value: object) -> None:
    for name in JOB:
        write(run, "job.json", {**JOB, name: value})
        look_at(run)
    write(run, "job.json", JOB)
    write(run, "run.json", {"total_steps": value})
    look_at(run)
    for name in STOPPED:
        write(run, "run.json", {"total_steps": 10, "stopped_early": {**STOPPED, name: value}})
        look_at(run)
    write(run, "run.json", {"total_steps": 10, "stopped_early": value})
    look_at(run)
    for name in LINE:
        lines = [LINE, {**LINE, name: value}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        look_at(run)
    write(run, "metrics.jsonl", LINE)
    write(run, "run.json", value)
    for name in CONFIG:
        write(run, "config.yaml", {**CONFIG, name: value})
        look_at(run)
    write(run, "config.yaml", {**CONFIG, "trainer": {"max_steps": value}, "loss": {"name": value}})
    look_at(run)
    for name in ("job.json", "config.yaml"):
        write(run, name, value)
        look_at(run)


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{k}: &a{k} [{','.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 30)
)


CONTENTS = {
    **{"empty": b"", "null": b"\0", "not UTF-8": b"\xff\xfe", "cut": b"{", "long number": b"1" * 5000},
    **{
        "deep": b"[" * 100_000,
        "bomb": BOMB.encode(),
        "circle": b"a: &a [*a]",
        "long": b"x" * 2**19,
        "key": b"? [a]\n: b",
    },
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_odd_contents(run: Path, content: bytes) -> None:
    for name in ("job.json", "run.json", "config.yaml"):
        before = (run / name).read_bytes()
        (run / name).write_bytes(content)
        look_at(run)
        (run / name).write_bytes(before)
    (run.parent / "job" / "outcome").write_bytes(content)
    assert look_at(run)[1].startswith("unknown, ")


def to_pipe(path: Path) -> None:
    os.mkfifo(path)


def to_endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def to_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("become", [to_pipe, to_endless, to_folder])
def test_pipes_devices_and_folders_in_place_of_files(run: Path, become: Callable[[Path], None]) -> None:
    for path in (run / "run.json", run / "config.yaml", run.parent / "job" / "outcome", run / "job.json"):
        path.unlink()
        become(path)
        with pytest.raises(OSError, match=r"regular|directory|large"):
            read_small(path)
        look_at(run)
    assert read_facts(run / "run.json") == {}
    assert read_record(run) is None


def test_a_record_is_read_as_it_was_left(run: Path) -> None:
    assert read_record(run) == JobRecord("17_3", 1, "stopped SIGTERM")
    assert read_record(run.parent) is None
