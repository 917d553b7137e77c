"""What requests to a model's server say, and servers that do not take all of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.answers.completions import CompletionRequests, check_can_echo, refused_neutral
from nemo_lmpo.answers.endpoint import Endpoint, Limits
from nemo_lmpo.answers.sampling import NEUTRAL, Sampling
from nemo_lmpo.answers.sources import EndpointSource
from nemo_lmpo.errors import ConfigError, DataError, UserError
from nemo_lmpo.evaluate.answers import collect_answers
from nemo_lmpo.evaluate.data_files import Instruction
from tests.answering_server import serving_answers

LIMITS = Limits(concurrency=3, retries=1, backoff=0.001)
Reply = tuple[int, Any]
COUNT = 6
NEEDED = {"model", "prompt", "max_tokens", "temperature", "seed", "stop_token_ids", "skip_special_tokens"}


@dataclass
class Server:
    """Completes what its function lets through."""

    answers: Callable[[dict[str, Any]], Reply]
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)

    def endpoint(self) -> Endpoint:
        return Endpoint("--endpoint", self.url, LIMITS)

    def source(self) -> EndpointSource:
        requests = CompletionRequests("model", [2, 9], Sampling(20, 0.7, 0.9, seed=42))
        prompts = {str(index): [1, 5, 7 + index] for index in range(COUNT)}
        return EndpointSource(self.endpoint(), prompts, requests, 64)


def answering(answers: Callable[[dict[str, Any]], Reply]) -> AbstractContextManager[Server]:
    return serving_answers(Server(answers))


def good(body: dict[str, Any]) -> Reply:
    return 200, {"choices": [{"text": f"answer {body['prompt'][-1]}", "finish_reason": "stop"}]}


def refusing(*names: str, status: int = 400, say: bool = True) -> Callable[[dict[str, Any]], Reply]:
    """A server that refuses requests with any of some parameters."""

    def answers(body: dict[str, Any]) -> Reply:
        found = [name for name in names if name in body]
        if not found:
            return good(body)
        return status, {"error": {"message": f"unknown parameter: {found[0]}" if say else "bad request"}}

    return answers


def collect(source: EndpointSource, folder: Path) -> dict[str, str]:
    instructions = [Instruction(str(index), f"Say {index}", "base") for index in range(COUNT)]
    answers = collect_answers(instructions, folder, source, allow_empty=True, quiet=True)
    return {name: answer.text for name, answer in answers.items()}


EXPECTED = {str(index): f"answer {7 + index}" for index in range(COUNT)}


def test_every_sampling_parameter_is_named(tmp_path: Path) -> None:
    with answering(good) as server:
        assert collect(server.source(), tmp_path) == EXPECTED
    assert len(server.asked) == COUNT, "no request but for answers"
    for body in server.asked:
        assert set(body) == NEEDED | set(NEUTRAL)
        own = {"top_p": 0.9, "temperature": 0.7}
        assert {**body, **NEUTRAL, **own} == body
        assert body["top_k"] == -1


@pytest.mark.parametrize("say", [True, False])
@pytest.mark.parametrize("status", [400, 422])
def test_neutral_parameters_that_are_refused_are_left_out_with_a_word(
    status: int, say: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with answering(refusing("min_p", "typical_p", status=status, say=say)) as server:
        source = server.source()
        with caplog.at_level(logging.WARNING, "nemo_lmpo"):
            assert collect(source, tmp_path) == EXPECTED
        assert "refuses min_p, typical_p: answers are asked for without" in caplog.text
        assert source.generation()["left to the server"] == ["min_p", "typical_p"]
        answered = [body for body in server.asked if body["prompt"][:2] == [1, 5] and body["max_tokens"] == 20]
        assert sum("min_p" not in body for body in answered) == COUNT


@pytest.mark.parametrize("name", ["stop_token_ids", "skip_special_tokens", "seed", "temperature"])
def test_what_answers_depend_on_must_be_taken(name: str, tmp_path: Path) -> None:
    with answering(refusing(name, "min_p")) as server:
        with pytest.raises(ConfigError, match=rf"refuses {name} \(it says 400: .*must take them in /v1/completions"):
            collect(server.source(), tmp_path)
        assert len(server.asked) < 20
    assert not (tmp_path / "answers.jsonl").read_bytes()


def test_token_ids_must_be_taken(tmp_path: Path) -> None:
    with answering(lambda body: (422, {"detail": "prompt must be a string"})) as server:
        with pytest.raises(ConfigError, match=r"does not complete a prompt of token ids \(it says 422: prompt must be"):
            collect(server.source(), tmp_path)
        assert len(server.asked) == 2


def test_a_first_prompt_that_is_refused_blocks_no_other(tmp_path: Path) -> None:
    """The first request is refused for its prompt, not for what the server cannot do."""

    def answers(body: dict[str, Any]) -> Reply:
        return (400, {"error": "no"}) if body["prompt"] == [1, 5, 7] and body["max_tokens"] == 20 else good(body)

    with answering(answers) as server:
        with pytest.raises(UserError, match=r"instruction 0: .* says 400 \(no\).*failed: 1 of 6 requests"):
            collect(server.source(), tmp_path)
        assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == COUNT - 1


def test_no_text_is_no_answer(tmp_path: Path) -> None:
    """`text: null` is neither the answer "None" nor an empty one."""

    def answers(body: dict[str, Any]) -> Reply:
        return (200, {"choices": [{"text": None}]}) if body["prompt"][-1] == 9 else good(body)

    with answering(answers) as server:
        with pytest.raises(UserError, match=r"instruction 2: .*answers with choices\[0\].text None"):
            collect(server.source(), tmp_path)
        server.answers = good
        assert collect(server.source(), tmp_path) == EXPECTED


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_answers_that_the_server_cut_are_no_answers(reason: str, tmp_path: Path) -> None:
    with (
        answering(lambda body: (200, {"choices": [{"text": "half", "finish_reason": reason}]})) as server,
        pytest.raises(UserError, match=rf"ended an answer early \(finish_reason {reason}\)"),
    ):
        collect(server.source(), tmp_path)


def test_one_odd_count_is_one_bad_answer_and_all_are_a_bos(tmp_path: Path) -> None:
    def counting(odd: Callable[[dict[str, Any]], bool]) -> Callable[[dict[str, Any]], Reply]:
        def answers(body: dict[str, Any]) -> Reply:
            status, content = good(body)
            return status, {**content, "usage": {"prompt_tokens": 3 + odd(body), "completion_tokens": 1}}

        return answers

    with answering(counting(lambda body: body["prompt"][-1] == 9)) as server:
        with pytest.raises(UserError, match=r"instruction 2: .*counts 4 tokens"):
            collect(server.source(), tmp_path / "one")
        assert len((tmp_path / "one" / "answers.jsonl").read_text().splitlines()) == COUNT - 1
    with answering(counting(lambda body: True)) as server:
        with pytest.raises(DataError, match="a second BOS"):
            collect(server.source(), tmp_path / "all")
        assert len(server.asked) == 1


def test_a_server_that_cannot_echo_says_so_before_work() -> None:
    """llama.cpp and `transformers serve` answer, but without the prompt's log-probabilities."""
    with (
        answering(lambda body: (200, {"choices": [{"text": "x", "index": 0}]})) as server,
        pytest.raises(
            ConfigError, match=r"without choices\[0\].logprobs.*need /v1/completions with `echo` and `logpro"
        ),
    ):
        check_can_echo(server.endpoint(), "model", [1, 2, 3])


def test_the_harness_gets_neutral_values_too(caplog: pytest.LogCaptureFixture) -> None:
    with answering(good) as server:
        assert refused_neutral(server.endpoint(), "model", [1, 2]) == []
    with answering(refusing("min_p")) as server, caplog.at_level(logging.WARNING, "nemo_lmpo"):
        assert refused_neutral(server.endpoint(), "model", [1, 2]) == ["min_p"]
    assert "refuses min_p" in caplog.text
