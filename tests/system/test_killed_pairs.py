"""`nemo-lmpo pairs` killed (SIGKILL) in every stage: the same command asks for the rest only, and ends the same."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.pairs.__main__ import main
from tests.answering_server import Reply, serving_answers
from tests.system.processes import training
from tests.system.rounds_runs import num_lines, pairs_of, rows_of
from tests.unit.pairs.models import save_policy

PROMPTS, SAMPLES, AT_A_TIME, PATIENCE = 8, 3, 2, 350.0


@dataclass
class ModelAndJudge:
    """Completes prompts by the request's seed, and grades answers by their first letter."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    answered: list[None] = field(default_factory=list)

    def answers(self, body: dict[str, Any]) -> Reply:
        time.sleep(0.02)  # so that a kill comes in the middle of a stage
        self.answered.append(None)
        if "messages" not in body:
            words = " ".join("abcdefgh"[(body["seed"] >> shift) % 8] for shift in range(3 + body["seed"] % 9))
            return 200, {"choices": [{"text": words, "finish_reason": "stop"}], "usage": {}}
        text = body["messages"][0]["content"]
        tops = [{"token": str(1 + sum(map(ord, text)) % 9), "logprob": math.log(0.9)}]
        choice = {
            "message": {"content": "1"},
            "finish_reason": "stop",
            "logprobs": {"content": [{"top_logprobs": tops}]},
        }
        return 200, {"model": "judge", "choices": [choice]}

    def count(self, what: str) -> int:
        """Requests to the model (`prompt`) or the judge (`messages`)."""
        return sum(what in body for body in self.asked)


def arguments(policy: Path, output: Path, server: ModelAndJudge) -> list[str]:
    return [
        *("--model", str(policy), "--output", str(output), "--prompts", "builtin:tiny", "--limit", str(PROMPTS)),
        *("--samples", str(SAMPLES), "--max-new-tokens", "60", "--concurrency", str(AT_A_TIME), "--quiet"),
        *("--endpoint", server.url, "--served-name", "m", "--judge-endpoint", server.url, "--judge", "j"),
    ]


def half_written(folder: Path) -> bool:
    return (folder / "pairs.jsonl").is_file() and not (folder / "pairs.json").is_file()


def at_least(journal: str, rows: int) -> Callable[[Path], bool]:
    return lambda folder: num_lines(folder / "work" / journal) >= rows


POINTS = (
    at_least("samples.jsonl", 5),
    at_least("samples.jsonl", 14),
    at_least("judge_calls.jsonl", 4),
    at_least("judge_calls.jsonl", 13),
    half_written,
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pairs_that_are_killed_ask_for_the_rest_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy, killed = save_policy(tmp_path / "policy"), tmp_path / "killed" / "pairs"
    wanted = PROMPTS * SAMPLES
    with serving_answers(ModelAndJudge()) as server:
        assert main(arguments(policy, tmp_path / "whole" / "pairs", server)) == 0
        judged = server.count("messages")
        assert server.count("prompt") == wanted
        server.asked.clear()
        server.answered.clear()
        for number, reached in enumerate(POINTS):
            kept = {what: num_lines(killed / "work" / name) for what, name in JOURNALS.items()}
            before = {what: server.count(what) for what in JOURNALS}
            with training(arguments(policy, killed, server), tmp_path, command="nemo_lmpo.pairs.__main__") as process:
                deadline = time.monotonic() + PATIENCE
                while not reached(killed):
                    assert process.is_alive(), (tmp_path / "output").read_text()
                    assert time.monotonic() < deadline, (tmp_path / "output").read_text()
                    time.sleep(0.001)
                if number == 0:
                    one_owner(arguments(policy, killed, server), killed, process, capsys)
                process.kill()
            wait_for_silence(server)
            for what, most in (("prompt", wanted), ("messages", judged)):
                # Nothing that was kept is asked again; what was on its way at the kill is.
                assert server.count(what) - before[what] <= most - kept[what]
        asked = {what: server.count(what) for what in JOURNALS}
        left = {what: num_lines(killed / "work" / name) for what, name in JOURNALS.items()}
        assert left == {"prompt": wanted, "messages": judged}
        assert asked["prompt"] <= wanted + 2 * AT_A_TIME
        assert asked["messages"] <= judged + 2 * AT_A_TIME
        assert main(arguments(policy, killed, server)) == 0
        assert {what: server.count(what) for what in JOURNALS} == asked
    assert pairs_of(killed) == pairs_of(tmp_path / "whole" / "pairs")
    for name in ("samples.jsonl", "scores.jsonl"):
        assert rows_of(killed / "work" / name) == rows_of(tmp_path / "whole" / "pairs" / "work" / name)


JOURNALS = {"prompt": "samples.jsonl", "messages": "judge_calls.jsonl"}


def wait_for_silence(server: ModelAndJudge) -> None:
    """Let requests that nobody waits for any more come and be answered."""
    deadline = time.monotonic() + PATIENCE
    time.sleep(0.3)
    while len(server.answered) < len(server.asked) and time.monotonic() < deadline:
        time.sleep(0.01)


def one_owner(again: list[str], folder: Path, process: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A second command is refused while the first one works, and has asked for nothing."""
    capsys.readouterr()
    assert main(again) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: --output {folder} is in use by process {process.pid} on host "), said
