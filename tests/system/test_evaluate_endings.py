"""Evaluations that are interrupted or killed while a judge hangs: they end, with all that they started."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

import nemo_lmpo.evaluate
from nemo_lmpo.evaluate import environment
from nemo_lmpo.evaluate.__main__ import main
from nemo_lmpo.evaluate.environment import VARIABLE
from nemo_lmpo.evaluate.local_server import JsonHandler, serve
from tests.distributed.workers import _context
from tests.system.processes import training

COMMAND = "nemo_lmpo.evaluate.__main__"
KEY = "sk-the-judges-own-key"
PROMPT = {"system": "Judge.", "template": "{QUESTION} {ANSWER_A} {ANSWER_B}"}


class HangingJudge:
    """Says which model it serves, and then nothing until it is released."""

    def __init__(self) -> None:
        self.url = ""
        self.asked, self.released = threading.Event(), threading.Event()


@contextmanager
def hanging() -> Iterator[HangingJudge]:
    judge = HangingJudge()

    class Handler(JsonHandler):
        def do_GET(self) -> None:
            self.send_json(200, {"data": [{"id": "judge"}]})

        def do_POST(self) -> None:
            self.body()
            judge.asked.set()
            judge.released.wait()
            self.close_connection = True

    with serve(Handler) as url:
        judge.url = url
        try:
            yield judge
        finally:
            judge.released.set()


def arguments(folder: Path, judge: HangingJudge) -> list[str]:
    """Arena-Hard on own questions with stored answers: nothing is computed before the judge is asked."""
    questions = [{"id": str(index), "question": f"Say {index}", "baseline_answer": "base"} for index in range(5)]
    answers = [{"uid": row["id"], "messages": [{}, {"content": {"answer": "mine"}}]} for row in questions]
    for name, rows in (("questions", questions), ("answers", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompt.json").write_text(json.dumps(PROMPT))
    files = ["--questions", "questions.jsonl", "--answers", "answers.jsonl", "--judge-prompt", "prompt.json"]
    return ["arena_hard", *files, "--judge-endpoint", judge.url, "--output", "out", "--concurrency", "1", "--quiet"]


@pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"set {VARIABLE} (make eval-env)")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_does_not_wait_for_a_judge(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with hanging() as judge:
        given = arguments(tmp_path, judge)
        with training(given, tmp_path, command=COMMAND) as process:
            assert judge.asked.wait(120), (tmp_path / "output").read_text()
            # One evaluation per folder: a second one pays for nothing.
            judge.asked.clear()
            assert main(given) == 1
            assert "--output out/arena_hard is in use by process" in capsys.readouterr().err
            assert not judge.asked.is_set()
            os.kill(process.pid, number)
            process.join(timeout=60)  # a request has 15 minutes, and eight more tries
            assert process.exitcode == 128 + number
        assert not judge.released.is_set()
        lines = [line for line in (tmp_path / "output").read_text().splitlines() if line]
        assert lines[-1] == "interrupted: run the same command to resume"
        assert "Traceback" not in "".join(lines)


PROGRAM = """
import multiprocessing, os, time
from pathlib import Path

def answer(request):
    Path(request["variables"]).write_text(repr(dict(os.environ)))
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    Path(request["pids"]).write_text(f"{os.getpid()} {child.pid}\\n")
    time.sleep(600)
"""


def _run_sleeper(programs: str, pids: str, variables: str) -> None:
    os.environ[VARIABLE] = sys.executable
    os.environ.update(OPENAI_API_KEY=KEY, MY_JUDGE=KEY, HF_TOKEN=KEY, HF_HOME="/hub", PYTHONPATH="/nowhere")
    environment._FOLDER = Path(programs)
    from nemo_lmpo.runtime.interruption import raising_when_interrupted

    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts the tests may ignore it, as nohup does
    with raising_when_interrupted():
        environment.run_program("sleeper", {"pids": pids, "variables": variables})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_scoring_programs_end_with_their_parent_and_get_no_key(number: signal.Signals, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    shutil.copytree(Path(nemo_lmpo.evaluate.__file__).parent / "scoring", programs)
    (programs / "sleeper.py").write_text(PROGRAM)
    pids, variables = tmp_path / "pids", tmp_path / "variables"
    parent: Any = _context().Process(target=_run_sleeper, args=(str(programs), str(pids), str(variables)))
    parent.start()
    deadline = time.monotonic() + 120
    while not (pids.exists() and pids.read_text().endswith("\n")) and time.monotonic() < deadline:
        assert parent.is_alive()
        time.sleep(0.01)
    started = [psutil.Process(int(pid)) for pid in pids.read_text().split()]
    os.kill(parent.pid, number)
    parent.join(timeout=60)
    assert not parent.is_alive()
    _, alive = psutil.wait_procs(started, timeout=60)
    for process in alive:
        process.kill()
    assert not alive
    assert KEY not in variables.read_text()
    assert "'HF_HOME': '/hub'" in variables.read_text()
    assert "PYTHONPATH" not in variables.read_text()
