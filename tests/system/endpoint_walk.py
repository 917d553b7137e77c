"""Every kind of request against a fault: what must hold whatever a server does."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.answers import http
from nemo_lmpo.answers.answer import Answer
from nemo_lmpo.answers.completions import CompletionRequests, check_can_echo
from nemo_lmpo.answers.endpoint import Endpoint, Limits, choose_model
from nemo_lmpo.answers.journal import Journal
from nemo_lmpo.answers.judge import JudgeServer
from nemo_lmpo.answers.sources import EndpointSource
from nemo_lmpo.errors import ConfigError, UserError
from nemo_lmpo.evaluate.alpaca_eval import check_logprobs
from nemo_lmpo.evaluate.answers import collect_answers
from nemo_lmpo.evaluate.arena_hard import judge as arena_judge
from nemo_lmpo.evaluate.data_files import Instruction, JudgePrompt
from nemo_lmpo.evaluate.gateway import Gateway
from nemo_lmpo.evaluate.pairwise import sampling_of
from nemo_lmpo.evaluate.suites import GenerationSettings
from tests.system.faulty_server import FAULTS, Fault, FaultyServer, damaged, good_reply
from tests.system.stub_server import MODEL

LIMITS = Limits(concurrency=3, retries=1, backoff=0.001, timeout=0.3)
INSTRUCTIONS = [Instruction(str(index), f"Say {index}", f"base {index} word word") for index in range(4)]
ANSWERS = {one.id: Answer(f"answer {one.id} of some words") for one in INSTRUCTIONS}
PROMPT = JudgePrompt(
    "Judge.",
    "{QUESTION}<|The Start of Assistant A's Answer|>\n{ANSWER_A}\n<|The End"
    "<|The Start of Assistant B's Answer|>\n{ANSWER_B}\n<|The End",
)
BAD = "1"
"""The instruction whose requests meet the fault."""


def is_bad(path: str, body: dict[str, Any]) -> bool:
    """Whether a request is about that instruction."""
    return "Say 1" in json.dumps(body.get("messages", "")) or body.get("prompt") == PROMPTS[BAD]


PROMPTS = {one.id: [1, 5, 7 + int(one.id)] for one in INSTRUCTIONS}


def models(server: FaultyServer, folder: Path) -> None:
    """Ask what is served."""
    server.hits = lambda path, body: True
    endpoint = Endpoint("--endpoint", server.url, LIMITS)
    with suppress(ConfigError):
        assert choose_model(endpoint, "named", "--name") == "named"
    assert choose_model(endpoint, None, "--name").encode()


def completions(server: FaultyServer, folder: Path) -> None:
    """Answer four instructions."""
    settings = GenerationSettings(0.7, 20)
    requests = CompletionRequests(MODEL, [2, 9], sampling_of(settings, 42))
    endpoint = Endpoint("--endpoint", server.url, LIMITS)
    source = EndpointSource(endpoint, PROMPTS, requests, 64)
    answers = collect_answers(INSTRUCTIONS, folder, source, allow_empty=True, quiet=True)
    assert list(answers) == [one.id for one in INSTRUCTIONS]
    assert all(isinstance(answer.text, str) and answer.text != "None" for answer in answers.values())


def chat(server: FaultyServer, folder: Path) -> None:
    """Judge four instructions in both orders."""
    judge = JudgeServer(Endpoint("--judge-endpoint", server.url, LIMITS), MODEL)
    verdicts, who = arena_judge(INSTRUCTIONS, ANSWERS, folder, judge, PROMPT, quiet=True)
    assert [len(games) for games in verdicts.values()] == [2] * 4
    unparsed = [verdict for games in verdicts.values() for verdict in games].count(None)
    assert who.refused <= unparsed <= 2


def preferences(server: FaultyServer, folder: Path) -> None:
    """Give the package the judge's preferences."""
    judge = JudgeServer(Endpoint("--judge-endpoint", server.url, LIMITS), MODEL)
    with Journal(folder / "calls", "key") as journal:
        gateway = Gateway(judge, journal, len(INSTRUCTIONS), check_logprobs)
        for one in INSTRUCTIONS:
            text = f'{one.text} "output": """a b {one.id}""" "output": """a a"""'
            body = {"model": MODEL, "logprobs": True, "messages": [{"role": "user", "content": text}]}
            try:
                found = gateway.respond(body)
            except UserError:
                break
            (top,) = found["choices"][0]["logprobs"]["content"]
            assert all(isinstance(token["logprob"], float) for token in top["top_logprobs"])
            assert isinstance(found["choices"][0]["message"]["content"], str)
        gateway.failures.raise_first()


def echo(server: FaultyServer, folder: Path) -> None:
    """See whether the leaderboard's tasks can be scored."""
    server.hits = lambda path, body: True
    check_can_echo(Endpoint("--endpoint", server.url, LIMITS), MODEL, [1, 2, 3])


KINDS: dict[str, Callable[[FaultyServer, Path], None]] = {
    "models": models,
    "completions": completions,
    "chat": chat,
    "preferences": preferences,
    "echo": echo,
}
_JOURNALS = {"completions": "answers.jsonl", "chat": "judgments.jsonl", "preferences": "calls"}
_GOOD_BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "models": ("models", {}),
    "completions": ("completions", {"prompt": [1, 5, 8], "max_tokens": 20}),
    "chat": (
        "chat/completions",
        {"messages": [{"content": PROMPT.messages("Say 1", "a b c", "a a a")[1]["content"]}]},
    ),
    "preferences": (
        "chat/completions",
        {"logprobs": True, "messages": [{"content": '"output": """a b""" "output": """a a"""'}]},
    ),
    "echo": ("completions", {"prompt": [[1, 2, 3]], "echo": True, "max_tokens": 1}),
}
_EVERYBODY = (
    "status 401",
    "status 403",
    "status 404",
    "status 405",
    "status 429",
    "status 501",
    "redirect",
    "retry after",
)
"""Faults that are the server's, not one request's; so are those of a connection."""
_CONNECTION = (
    *("no reply", "reset", "not http", "no status", "long header", "many headers", "drip", "shorter", "length not"),
    *("negative", "broken", "unfinished", "not gzip"),
)


def cases(kind: str) -> Iterator[tuple[str, Fault]]:
    """All faults for one kind of request."""
    path, body = _GOOD_BODIES[kind]
    yield from FAULTS.items()
    yield from damaged(good_reply(f"/v1/{path}", body))


@contextmanager
def _no_tracebacks() -> Iterator[None]:
    """No thread may end with an error that nobody sees."""
    seen: list[Any] = []
    before, threading.excepthook = threading.excepthook, seen.append
    try:
        yield
    finally:
        threading.excepthook = before
    assert not seen, seen


def walk(kind: str, name: str, fault: Fault, server: FaultyServer, folder: Path, patch: pytest.MonkeyPatch) -> str:
    """One kind of request against one fault; what it said, or nothing if all went well.

    Nothing but a sentence comes of it; whatever was answered is kept; instructions beside the bad one are answered; and
    when the server is well again, only what is missing is asked for.
    """
    patch.setattr(http, "MAX_REPLY_BYTES", 2**20)
    logging.getLogger("nemo_lmpo").setLevel(logging.ERROR)
    server.fault, server.hits = fault, is_bad
    with _no_tracebacks():
        said = _said(KINDS[kind], server, folder)
    if said:
        assert server.url in said, f"{name}: the server is not named: {said}"
        assert said.isprintable(), f"{name}: {said!r}"
        assert len(said) < 1200, f"{name}: {said}"
        assert "secret" not in said
        assert ";" in said, f"{name}: no remedy: {said}"
    if kind not in _JOURNALS:
        return said
    rows = _rows(folder / _JOURNALS[kind])
    alone = not name.startswith(_EVERYBODY) and not name.startswith(_CONNECTION)
    total = {"completions": 4, "chat": 8, "preferences": 4}[kind]
    bad = total // 4
    if said and alone:
        assert rows >= total - bad, f"{name}: one bad item blocked others: {rows} of {total} ({said})"
    server.fault = None
    server.asked.clear()
    assert _said(KINDS[kind], server, folder) == "", f"{name}: it does not go on"
    assert len(server.asked) == total - rows, f"{name}: {len(server.asked)} asked, {rows} of {total} were there"
    return said


def _said(ask: Callable[[FaultyServer, Path], None], server: FaultyServer, folder: Path) -> str:
    try:
        ask(server, folder)
    except UserError as error:
        return str(error)
    return ""


def _rows(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
