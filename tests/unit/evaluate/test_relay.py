"""The harness's requests: relayed with neutral values, checked, and with the first error kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from nemo_lmpo.answers.endpoint import Endpoint, Limits
from nemo_lmpo.errors import UserError
from nemo_lmpo.evaluate.relay import Relay
from tests.system.faulty_server import FAULTS, FaultyServer, damaged, faulty, good_reply
from tests.system.stub_server import MODEL

ECHO = {"model": MODEL, "prompt": [[1, 2, 3], [4, 5]], "echo": True, "logprobs": 1, "max_tokens": 1}
TEXTS = {"model": MODEL, "prompt": [[1, 2, 3]], "max_tokens": 5, "temperature": 0, "stop": ["\n"]}


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with faulty() as running:
        yield running


def relay(server: FaultyServer, *left_out: str) -> Relay:
    endpoint = Endpoint("--endpoint", server.url, Limits(retries=1, backoff=0.001, timeout=0.3))
    return Relay(endpoint, left_out)


@pytest.mark.parametrize("body", [ECHO, TEXTS], ids=["echo", "texts"])
def test_good_replies_pass_unchanged(body: dict[str, Any], server: FaultyServer) -> None:
    assert relay(server, "min_p").respond(body) == good_reply("/v1/completions", body)
    (_, sent) = server.asked[0]
    assert {**sent, **body} == sent
    assert sent["repetition_penalty"] == 1.0
    assert "min_p" not in sent


@pytest.mark.parametrize("body", [ECHO, TEXTS], ids=["echo", "texts"])
def test_a_slice_of_all_faults(body: dict[str, Any], server: FaultyServer) -> None:
    """A reply passes if the harness can read it; else there is a sentence, and nothing more is asked."""
    cases = [*FAULTS.items(), *damaged(good_reply("/v1/completions", body))]
    said: list[str] = []
    for number, (name, fault) in enumerate(cases):
        if number % 8 != 5:
            continue
        server.fault = fault
        one = relay(server)
        try:
            reply = one.respond(body)
        except UserError as error:
            said.append(str(error))
            with pytest.raises(UserError, match="the same command resumes"):
                one.failures.raise_first()
            continue
        # What `lm_eval` does with it.
        for choice, prompt in zip(reply["choices"], body["prompt"], strict=True):
            if body is TEXTS:
                assert isinstance(choice["text"], str)
                continue
            assert sum(choice["logprobs"]["token_logprobs"][1 : len(prompt)]) < 0, name
            assert all(max(top.values()) is not None for top in choice["logprobs"]["top_logprobs"][1 : len(prompt)]), (
                name
            )
