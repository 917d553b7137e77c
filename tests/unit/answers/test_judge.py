"""Judges that decline, think first, or take other parameters; one bad answer never ends an evaluation."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.answers.answer import Answer
from nemo_lmpo.answers.endpoint import Endpoint, Limits
from nemo_lmpo.answers.journal import Journal
from nemo_lmpo.answers.judge import JudgeServer, parse_extra
from nemo_lmpo.answers.sampling import NEUTRAL
from nemo_lmpo.errors import ConfigError, DataError, UserError
from nemo_lmpo.evaluate.alpaca_eval import check_logprobs
from nemo_lmpo.evaluate.arena_hard import judge as arena_judge
from nemo_lmpo.evaluate.data_files import Instruction, JudgePrompt
from nemo_lmpo.evaluate.gateway import Gateway, answering_models
from nemo_lmpo.evaluate.local_server import JsonHandler
from nemo_lmpo.evaluate.pairwise import count_unparsed
from nemo_lmpo.evaluate.result import Judge
from tests.answering_server import serving_answers

LIMITS = Limits(concurrency=3, retries=1, backoff=0.001)
NAME = "judge"
PROMPT = JudgePrompt("Judge.", "{QUESTION} {ANSWER_A} {ANSWER_B}")
Reply = tuple[int, Any]


@dataclass
class Server:
    """A judge whose answers are told by a function of the request."""

    answers: Callable[[dict[str, Any]], Reply]
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)

    def judge(self, **extra: Any) -> JudgeServer:
        return JudgeServer(Endpoint("--judge-endpoint", self.url, LIMITS), NAME, extra)


def answering(answers: Callable[[dict[str, Any]], Reply]) -> AbstractContextManager[Server]:
    return serving_answers(Server(answers))


def said(content: Any, **more: Any) -> Reply:
    """A chat completion."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    choice["message"].update(more.pop("message", {}))
    choice.update(more)
    return 200, {"model": "judge-1", "choices": [choice]}


def error(status: int, message: str, **more: Any) -> Reply:
    return status, {"error": {"message": message, "type": "invalid_request_error", **more}}


GOOD = said("The verdict is [[A>B]].")
FILTERED = {"code": "content_filter", "innererror": {"code": "ResponsibleAIPolicyViolation"}}
REFUSALS = {
    "content null and a refusal": said(None, message={"refusal": "I cannot help with that."}),
    "content null, filtered": said(None, finish_reason="content_filter"),
    "a verdict, then filtered": said("[[A>B]]", finish_reason="content_filter"),
    "a refusal part": said([{"type": "refusal", "refusal": "no"}]),
    "status 400": error(400, "The response was filtered", **FILTERED),
    "status 400, inner code": error(400, "filtered", code=None, innererror={"code": "ResponsibleAIPolicyViolation"}),
    "status 400, OpenAI": error(400, "flagged", code="invalid_prompt"),
    "status 403": error(403, "flagged", code="content_policy_violation"),
}


def instructions(count: int) -> tuple[list[Instruction], dict[str, Answer]]:
    every = [Instruction(str(index), f"Say {index}.", f"base {index}") for index in range(count)]
    return every, {one.id: Answer(f"answer {one.id}") for one in every}


def arena(server: Server, folder: Path, count: int = 4, **extra: Any) -> tuple[dict[str, list[str | None]], Judge]:
    chosen, answers = instructions(count)
    return arena_judge(chosen, answers, folder, server.judge(**extra), PROMPT, quiet=True)


def is_about(body: dict[str, Any], text: str) -> bool:
    return text in json.dumps(body["messages"])


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_a_judge_that_declines_is_counted_and_asked_once(refusal: Reply, tmp_path: Path) -> None:
    with answering(lambda body: refusal if is_about(body, "Say 1.") else GOOD) as server:
        verdicts, who = arena(server, tmp_path)
        assert verdicts["1"] == [None, None]
        assert all(games == ["A>B", "A>B"] for name, games in verdicts.items() if name != "1")
        assert (who.refused, who.answered) == (2, {"judge-1": 6})
        assert len(server.asked) == 8
        server.asked.clear()
        assert arena(server, tmp_path)[1].refused == 2  # the journal has it
        assert not server.asked


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_the_package_goes_on_where_the_judge_declines(refusal: Reply, tmp_path: Path) -> None:
    top = [{"token": "m", "logprob": -0.1}, {"token": "M", "logprob": -3}]
    good = said("m", logprobs={"content": [{"token": "m", "logprob": -0.1, "top_logprobs": top}]})
    with answering(lambda body: refusal if is_about(body, "Say 1.") else good) as server:
        for _ in range(2):
            with Journal(tmp_path / "calls", "key") as journal:
                gateway = Gateway(server.judge(), journal, 3, check_logprobs)
                found = [gateway.respond({"messages": [{"content": f"Say {index}."}]}) for index in range(3)]
                gateway.failures.raise_first()
                assert len(gateway.refused) == 1
                assert answering_models(journal) == {"judge-1": 2}
            labels = [
                [one["token"] for one in a["choices"][0]["logprobs"]["content"][0]["top_logprobs"]] for a in found
            ]
            assert labels == [["m", "M"], [" "], ["m", "M"]]
        assert len(server.asked) == 3


def test_declined_calls_are_kept_apart_within_one_per_cent() -> None:
    who = Judge(NAME, {}, "", "", refused=2)
    assert count_unparsed(["A>B"] * 297 + [None] * 3, who) == 3
    with pytest.raises(
        DataError, match=r"no verdict in 4 of 300 answers \(2 of them it declined to give\), more than 1 %"
    ):
        count_unparsed(["A>B"] * 296 + [None] * 4, who)


@pytest.mark.parametrize(
    "content",
    [
        "[[B>>A]]",
        [{"type": "text", "text": "[[B>>A]]"}],
        [
            {"type": "thinking", "thinking": "[[A>>B]]"},
            {"type": "text", "text": "so [[B"},
            "&gt;",
            {"type": "text", "text": ">>A]]"},
        ],
    ],
)
def test_text_comes_in_parts(content: Any, tmp_path: Path) -> None:
    if isinstance(content, list):
        content = [one for one in content if one != "&gt;"]
    with answering(lambda body: said(content)) as server:
        verdicts, _ = arena(server, tmp_path, 1)
    assert verdicts == {"0": ["B>>A", "B>>A"]}


def test_a_judge_that_thinks_is_asked_as_it_wants(tmp_path: Path) -> None:
    """As OpenAI's reasoning models: other names, no temperature, no foreign parameters."""
    own = {"model", "messages", "max_completion_tokens", "reasoning_effort", "stream"}
    messages = {
        "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
        "'max_completion_tokens' instead.",
        "temperature": "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) "
        "value is supported.",
    }

    def answers(body: dict[str, Any]) -> Reply:
        for name in sorted(set(body) - own):
            if name in messages:
                return error(400, messages[name], param=name, code="unsupported_parameter")
            return error(400, f"Unrecognized request argument supplied: {name}", code=None, param=None)
        assert body["reasoning_effort"] == "low"
        assert body["max_completion_tokens"] == 30_000
        return GOOD

    chosen, given = instructions(6)
    with answering(answers) as server:
        judge = server.judge(reasoning_effort="low")
        verdicts, who = arena_judge(chosen, given, tmp_path, judge, PROMPT, max_tokens=30_000, quiet=True)
        assert all(games == ["A>B", "A>B"] for games in verdicts.values())
        assert who.request == {"max_tokens": 30_000, "reasoning_effort": "low"}
        served = [body for body in server.asked if set(body) <= own]
        assert len(served) == 12
        # Each refusal is learned once; only requests that were on their way meet it again.
        assert len(server.asked) - len(served) <= 3 * (len(NEUTRAL) + 2)


def test_all_sampling_parameters_are_named(tmp_path: Path) -> None:
    with answering(lambda body: GOOD) as server:
        arena(server, tmp_path, 1)
        arena(server, tmp_path / "other", 1, top_k=7, temperature=None)
    first, other = server.asked[0], server.asked[2]
    assert {**NEUTRAL, **first} == first
    assert (first["temperature"], first["max_tokens"]) == (0, 4096)
    assert other["top_k"] == 7
    assert "temperature" not in other


def test_a_bad_prompt_teaches_nothing(tmp_path: Path) -> None:
    """A prompt that is too long is refused without naming a parameter: the others are asked as before."""
    with answering(lambda body: error(400, "too many tokens") if is_about(body, "Say 3.") else GOOD) as server:
        with pytest.raises(UserError, match=r"says 400 \(too many tokens\).*failed: 2 of 8 requests"):
            arena(server, tmp_path)
        assert all(set(NEUTRAL) <= set(body) for body in server.asked if not is_about(body, "Say 3."))
    assert len((tmp_path / "judgments.jsonl").read_text().splitlines()) == 6


def test_a_server_that_serves_nothing_is_left_alone(tmp_path: Path) -> None:
    with answering(lambda body: (200, {"choices": "x"})) as server:
        with pytest.raises(
            UserError, match=r"answers with choices 'x'; it must serve .* stopped after \d of 200 requests"
        ):
            arena(server, tmp_path, 100)
        assert len(server.asked) <= 5 + LIMITS.concurrency


@pytest.mark.parametrize("text", ["[]", "1", "{", '"x"', "NaN", '{"a": NaN}', '{"a": "\\ud800"}'])
def test_extra_must_be_an_object(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--judge-extra .* is not a JSON object"):
        parse_extra(text)


@pytest.mark.parametrize("name", ["model", "messages", "stream", "n", "logprobs", "top_logprobs"])
def test_extra_does_not_change_what_is_judged(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--judge-extra must not set {name}"):
        parse_extra(json.dumps({name: 1}))
    assert parse_extra('{"reasoning_effort": "low", "temperature": null}') == {
        "reasoning_effort": "low",
        "temperature": None,
    }


def test_judges_that_are_asked_otherwise_are_others() -> None:
    one = Judge(NAME, {"judge-1": 10}, "", "prompt")
    assert one.identity == Judge(NAME, {"judge-1": 9}, "", "prompt", refused=1).identity
    assert one.identity != Judge(NAME, {"judge-1": 10}, "", "prompt", request={"reasoning_effort": "low"}).identity


def test_a_full_disk_ends_the_asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judgment that cannot be kept is paid once, and no other is asked for."""
    real, written = os.write, 0

    def write(file: int, content: Any) -> int:
        nonlocal written
        written += 1
        if written > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, content)

    with answering(lambda body: GOOD) as server:
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", write)
            with pytest.raises(UserError, match=r"judgments.jsonl cannot be written \(No space left on device\)"):
                arena(server, tmp_path, 50)
        assert len(server.asked) <= 2 + 2 * LIMITS.concurrency
        server.asked.clear()
        arena(server, tmp_path, 50)
        assert len(server.asked) == 98


def test_a_full_disk_ends_the_packages_asking_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = [{"token": "m", "logprob": -0.1}]
    good = said("m", logprobs={"content": [{"token": "m", "logprob": -0.1, "top_logprobs": top}]})
    with answering(lambda body: good) as server, Journal(tmp_path / "calls", "key") as journal:
        gateway = Gateway(server.judge(), journal, 9, check_logprobs)
        monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no room")))
        for index in range(9):
            with pytest.raises(UserError):
                gateway.respond({"messages": [{"content": f"Say {index}."}]})
        assert len(server.asked) == 1
        with pytest.raises(UserError, match=r"calls cannot be written \(no room\).*the same command resumes"):
            gateway.failures.raise_first()
    assert (tmp_path / "calls").read_bytes() == b""


def test_who_asks_to_wait_for_days_is_not_waited_for(tmp_path: Path) -> None:
    with answering(lambda body: error(429, "slow down")) as server:
        handler_headers = {"Retry-After": "100000"}
        original = JsonHandler.end_headers

        def end_headers(self: JsonHandler) -> None:
            for name, value in handler_headers.items():
                self.send_header(name, value)
            original(self)

        JsonHandler.end_headers = end_headers  # type: ignore[method-assign, assignment]
        try:
            with pytest.raises(UserError, match=r"says 429 and asks to wait for 100000 seconds"):
                arena(server, tmp_path, 20)
        finally:
            JsonHandler.end_headers = original  # type: ignore[method-assign]
        assert len(server.asked) <= 2 * LIMITS.concurrency


def test_an_interruption_leaves_requests_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge never answers; whoever interrupts gets the terminal back while it still hangs."""
    hangs = threading.Event()
    began = threading.Event()

    def answers(body: dict[str, Any]) -> Reply:
        began.set()
        hangs.wait()
        return GOOD

    real = threading.Thread.join

    def join(self: threading.Thread, timeout: float | None = None) -> None:
        if self.name == "worker" and began.is_set():
            raise KeyboardInterrupt
        real(self, timeout)

    with answering(answers) as server:
        monkeypatch.setattr(threading.Thread, "join", join)
        try:
            with pytest.raises(KeyboardInterrupt):
                arena(server, tmp_path)
            assert not hangs.is_set()
            assert (tmp_path / "judgments.jsonl").read_bytes() == b""
        finally:
            monkeypatch.undo()
            hangs.set()
    assert (tmp_path / "judgments.jsonl").read_bytes() == b"", "a late judgment is not written to a closed file"
