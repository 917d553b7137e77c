"""The half-hour on a GPU, rehearsed on CPUs: every GPU test and benchmark runs to its end, and a kill is no loss."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from benchmarks.half_hour.__main__ import MORE_TO_DO, run_pieces
from benchmarks.half_hour.execute import Execute
from benchmarks.half_hour.journal import CUT_OFF, MOST_ATTEMPTS, Journal
from benchmarks.half_hour.pieces import (
    BYTES_PER_PARAMETER,
    DISK_GIB,
    HALF_HOUR,
    KEPT_AT_ONCE,
    Piece,
    large_overrides,
    pieces,
)
from tests.te_emulation.host import find_python

ROOT = Path(__file__).resolve().parent.parent.parent
LONGEST_COMMAND = 600.0
NOT_REHEARSED: dict[str, str] = {}
"""Tests of tests/gpu that are skipped in a rehearsal, with their reason."""


def half_hour(work: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return subprocess.Popen(
        ["bash", str(ROOT / "benchmarks" / "gpu_half_hour.sh"), "--rehearse", f"--work={work}", "--seconds=3000"],
        env={**environment, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_a_piece_after_the_first(work: Path, process: subprocess.Popen[str]) -> None:
    path = work / "rehearsal" / "journal.json"
    while not (path.exists() and len(json.loads(path.read_text())["begun"]) > 1):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.mark.timeout(1500)
def test_it_is_rehearsed_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    first = half_hour(tmp_path)
    wait_for_a_piece_after_the_first(tmp_path, first)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    second = half_hour(tmp_path)
    output, _ = second.communicate()
    page = (tmp_path / "rehearsal" / "page.md").read_text()
    assert second.returncode == 0, output + page
    begun = json.loads((tmp_path / "rehearsal" / "journal.json").read_text())["begun"]
    assert begun["doctor"] == 1, "it is done, and the kill came later"
    assert begun["run"] in (1, 2)  # it may have ended between the look and the kill
    assert "ok attention (flash)" in page
    assert "0 are left" in page
    assert "not run yet" not in page or find_python() is None
    every_test_ran(tmp_path / "rehearsal")


def every_test_ran(work: Path) -> None:
    """The markers part the tests: each is in one of the two runs, and none is skipped without a reason here."""
    reports = [work / "tests.xml", *([work / "tests_engine.xml"] if find_python() else [])]
    cases = [case for report in reports for case in ElementTree.parse(report).iter("testcase")]
    names = [f"{case.get('classname')}.{case.get('name')}" for case in cases]
    assert len(names) == len(set(names)), "a test is in both runs"
    skipped = {case.get("name", ""): case for case in cases if case.find("skipped") is not None}
    assert skipped.keys() == NOT_REHEARSED.keys()
    marks = [
        piece.command[piece.command.index("pytest") + 3]
        for piece in pieces(work, rehearse=True)
        if "pytest" in piece.command
    ]
    assert marks == [f"not {marks[-1]}", marks[-1]], "one takes what the other leaves"
    assert all(list(ElementTree.parse(report).iter("testcase")) for report in reports)


def by_names(failing: Sequence[str] = ()) -> tuple[list[str], Execute]:
    ran: list[str] = []

    def run(command: Sequence[str], environment: Mapping[str, str], output: Path, seconds: float) -> int:
        ran.append(command[0])
        output.write_text(f"{command[0]} says a word\n")
        return 5 if command[0] in failing else 0

    return ran, run


WANTED = [Piece(name, "tests", f"Piece {name}", [name], 100) for name in ("a", "b", "c")]


def test_a_piece_that_fails_fails_the_half_hour(tmp_path: Path) -> None:
    """As pytest does by status 5 where a marker selects no test."""
    ran, run = by_names(failing=("b",))
    assert run_pieces(WANTED, tmp_path, tmp_path / "page.md", run=run, seconds=1000, rehearsed=True) == 1
    assert ran == ["a", "b", "c"]
    page = (tmp_path / "page.md").read_text()
    assert "## Failed: Piece b" in page
    assert "b says a word" in page
    assert "status 5" in page


def test_what_there_is_no_time_for_is_left(tmp_path: Path) -> None:
    ran, run = by_names()
    for seconds, status in ((50.0, MORE_TO_DO), (1000.0, 0), (1000.0, 0)):
        assert run_pieces(WANTED, tmp_path, tmp_path / "page.md", run=run, seconds=seconds, rehearsed=True) == status
    assert ran == ["a", "b", "c"], "each once"


def test_a_piece_that_ends_the_machine_is_not_begun_for_ever(tmp_path: Path) -> None:
    ran, run = by_names()
    for _ in range(MOST_ATTEMPTS):
        assert Journal(tmp_path / "journal.json").begin("a")  # and nothing after it: killed
    assert run_pieces(WANTED, tmp_path, tmp_path / "page.md", run=run, seconds=1000, rehearsed=True) == 1
    assert ran == ["b", "c"]
    assert Journal(tmp_path / "journal.json").outcomes["a"].status == CUT_OFF


def test_it_fits_half_an_hour_and_the_disk(tmp_path: Path) -> None:
    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.runtime.files import GIB
    from nemo_lmpo.training.start_model import find_start_model

    all_pieces = pieces(tmp_path, rehearse=False)
    assert sum(piece.seconds for piece in all_pieces) <= HALF_HOUR
    assert max(piece.seconds for piece in all_pieces) < LONGEST_COMMAND
    config = load_recipe("lmpo_tiny", large_overrides())
    parameters = find_start_model(config.model).architecture.num_parameters()
    assert parameters > 1.5e9, "small ones are no test of saving"
    on_disk = KEPT_AT_ONCE * BYTES_PER_PARAMETER * parameters / GIB
    assert on_disk < 0.8 * DISK_GIB, f"{on_disk:.0f} GiB"


@pytest.mark.parametrize("rehearse", [True, False])
def test_its_settings_are_known(rehearse: bool, tmp_path: Path) -> None:
    from nemo_lmpo.config.recipe import load_recipe

    trained = [piece.command for piece in pieces(tmp_path, rehearse=rehearse) if "nemo_lmpo.train" in piece.command]
    assert len(trained) > 5
    for command in trained:
        load_recipe(command[3], command[4:])
