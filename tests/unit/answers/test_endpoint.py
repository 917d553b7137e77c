"""Servers that are busy, gone, strange, or add a BOS of their own; against a real server on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.answers.completions import CompletionRequests
from nemo_lmpo.answers.endpoint import Endpoint, Limits, choose_model
from nemo_lmpo.answers.journal import Journal
from nemo_lmpo.answers.judge import JudgeServer
from nemo_lmpo.answers.sources import EndpointSource
from nemo_lmpo.errors import ConfigError, DataError, UserError
from nemo_lmpo.evaluate.alpaca_eval import check_logprobs
from nemo_lmpo.evaluate.answers import choose, collect_answers
from nemo_lmpo.evaluate.arena_hard import judge as arena_judge
from nemo_lmpo.evaluate.data_files import Instruction, JudgePrompt
from nemo_lmpo.evaluate.gateway import Gateway, answering_models
from nemo_lmpo.evaluate.local_server import JsonHandler, serve
from nemo_lmpo.evaluate.pairwise import sampling_of
from nemo_lmpo.evaluate.suites import GenerationSettings
from tests.system.faulty_server import faulty, says
from tests.system.stub_server import ANSWERED_AS, MODEL, Stub, serving

QUICK = Limits(concurrency=3, retries=2, backoff=0.01)
PROMPT = JudgePrompt(
    "Judge {them}.",
    "{QUESTION}<|The Start of Assistant A's Answer|>\n{ANSWER_A}\n<|The End"
    "<|The Start of Assistant B's Answer|>\n{ANSWER_B}\n<|The End",
)


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving() as running:
        yield running


def instructions(count: int) -> list[Instruction]:
    return [Instruction(str(index), f"Say {index}", f"base {index} word word") for index in range(count)]


def source(stub: Stub, count: int, settings: GenerationSettings | None = None) -> EndpointSource:
    prompts = {str(index): [1, 5, 7 + index] for index in range(count)}
    endpoint = Endpoint("--endpoint", stub.url, QUICK)
    return make_source(endpoint, prompts, settings or GenerationSettings(0.7, 20))


def make_source(endpoint: Endpoint, prompts: dict[str, list[int]], settings: GenerationSettings) -> EndpointSource:
    requests = CompletionRequests(MODEL, [2, 9], sampling_of(settings, 42))
    return EndpointSource(endpoint, prompts, requests, 64)


def judge_of(stub: Stub, **extra: object) -> JudgeServer:
    return JudgeServer(Endpoint("--judge-endpoint", stub.url, QUICK), MODEL, extra)


def collect(stub: Stub, folder: Path, count: int = 7, allow_empty: bool = False) -> dict[str, Any] | None:
    return collect_answers(instructions(count), folder, source(stub, count), allow_empty=allow_empty, quiet=True)


def test_prompts_go_as_token_ids_with_the_settings(stub: Stub, tmp_path: Path) -> None:
    answers = collect(stub, tmp_path)
    asked = {tuple(body["prompt"]): body for path, body in stub.requests if path == "/v1/completions"}
    assert set(asked) == {(1, 5, 7 + index) for index in range(7)}
    body = asked[1, 5, 9]
    assert (body["temperature"], body["max_tokens"], body["stop_token_ids"]) == (0.7, 20, [2, 9])
    assert len({body["seed"] for body in asked.values()}) == 7
    assert list(answers) == [str(index) for index in range(7)]
    assert any(not answer.finished for answer in answers.values())


def test_seeds_do_not_depend_on_the_order(stub: Stub, tmp_path: Path) -> None:
    collect(stub, tmp_path / "all")
    first = {tuple(body["prompt"]): body["seed"] for _, body in stub.requests}
    stub.requests.clear()
    collect(stub, tmp_path / "some", 3)
    assert all(first[tuple(body["prompt"])] == body["seed"] for _, body in stub.requests)


def test_a_server_that_goes_away_loses_nothing(stub: Stub, tmp_path: Path) -> None:
    stub.faults.down_after = 4
    with pytest.raises(UserError, match=r"does not answer.*the same command resumes"):
        collect(stub, tmp_path)
    kept = len((tmp_path / "answers.jsonl").read_text().splitlines())
    assert 0 < kept <= 4
    stub.faults.down_after = None
    stub.requests.clear()
    assert len(collect(stub, tmp_path)) == 7
    assert stub.count("/v1/completions") == 7 - kept


def test_busy_servers_are_asked_again(stub: Stub, tmp_path: Path) -> None:
    stub.faults.busy = 2
    assert len(collect(stub, tmp_path)) == 7


def test_servers_that_stay_busy_say_so(stub: Stub, tmp_path: Path) -> None:
    stub.faults.busy = 10_000
    with pytest.raises(UserError, match=r"429 .*too many.* after 2 retries"):
        collect(stub, tmp_path)


def test_a_second_bos_is_noticed(stub: Stub, tmp_path: Path) -> None:
    stub.faults.extra_bos = True
    with pytest.raises(DataError, match=r"counts 4 tokens .* of which 3 were sent.*second BOS"):
        collect(stub, tmp_path)


def test_strange_answers_are_refused(stub: Stub, tmp_path: Path) -> None:
    stub.faults.strange_answers = True
    with pytest.raises(UserError, match=r"answers without choices; it must serve .*the same command resumes"):
        collect(stub, tmp_path)


def test_empty_answers_are_refused_unless_allowed(stub: Stub, tmp_path: Path) -> None:
    stub.faults.empty = True
    with pytest.raises(DataError, match="7 of 7 answers are empty"):
        collect(stub, tmp_path)
    assert len(collect(stub, tmp_path, allow_empty=True)) == 7


def test_prompts_without_room_name_the_instruction(stub: Stub, tmp_path: Path) -> None:
    narrow = make_source(Endpoint("--endpoint", stub.url, QUICK), {"0": [1] * 64}, GenerationSettings(0, 5))
    with pytest.raises(DataError, match="instruction 0 has 64 tokens, and the model 64 positions"):
        collect_answers(instructions(1), tmp_path, narrow, allow_empty=False, quiet=True)


def test_a_limit_is_part_of_a_larger_one() -> None:
    every = instructions(50)
    five, ten = choose(every, 5), choose(every, 10)
    assert {one.id for one in five} < {one.id for one in ten}
    assert [int(one.id) for one in ten] == sorted(int(one.id) for one in ten)
    assert choose(every, None) == choose(every, 50) == every
    with pytest.raises(ConfigError, match="--limit 0"):
        choose(every, 0)


def test_the_only_served_model_is_taken(stub: Stub) -> None:
    endpoint = Endpoint("--judge-endpoint", stub.url.removesuffix("/v1"), QUICK)
    assert choose_model(endpoint, None, "--judge") == MODEL
    with pytest.raises(ConfigError, match="--judge gpt-9 is not served"):
        choose_model(endpoint, "gpt-9", "--judge")


def test_no_server_is_one_sentence() -> None:
    with serving() as gone:
        url = gone.url
    with pytest.raises(UserError, match=r"--judge-endpoint http://127.*does not answer \(ConnectionRefusedError\)"):
        choose_model(Endpoint("--judge-endpoint", url, QUICK), None, "--judge")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://"])
def test_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is not a URL"):
        Endpoint("--endpoint", url, QUICK)


def test_keys_are_never_shown() -> None:
    endpoint = Endpoint("--endpoint", "https://user:secret@host:8/v1", QUICK, key="key")
    assert endpoint.shown == "https://host:8/v1"


def ask(gateway: Gateway, body: dict[str, Any]) -> Any:
    import requests

    headers = {"Authorization": f"Bearer {gateway.token}"}
    return requests.post(f"{gateway.base}/chat/completions", json=body, headers=headers, timeout=10)


BODY = {
    "model": MODEL,
    "logprobs": True,
    "messages": [{"role": "user", "content": '"output": """a b""" "output": """a a"""'}],
}


def test_the_gateway_remembers(stub: Stub, tmp_path: Path) -> None:
    for _ in range(2):
        with (
            Journal(tmp_path / "calls", "key") as journal,
            Gateway(judge_of(stub), journal, 2, check_logprobs).open() as gateway,
        ):
            answers = [ask(gateway, BODY).json() for _ in range(2)]
            assert answers[0]["choices"] == answers[1]["choices"]
            assert answering_models(journal) == {ANSWERED_AS: 1}
    assert len(stub.requests) == 1


def test_the_gateway_stops_at_the_first_failure(stub: Stub, tmp_path: Path) -> None:
    stub.faults.no_logprobs = True
    with (
        Journal(tmp_path / "calls", "key") as journal,
        Gateway(judge_of(stub), journal, 2, check_logprobs).open() as gateway,
    ):
        assert ask(gateway, BODY).status_code == 400
        assert ask(gateway, {**BODY, "other": 1}).status_code == 400
        with pytest.raises(UserError, match=r"returns no top_logprobs.*the same command resumes"):
            gateway.failures.raise_first()
        assert not journal.rows
    assert len(stub.requests) == 1


def test_arena_games_swap_the_answers_and_go_on(stub: Stub, tmp_path: Path) -> None:
    chosen = instructions(4)
    answers = collect(stub, tmp_path, 4)
    stub.requests.clear()
    stub.faults.down_after = 3
    with pytest.raises(UserError, match="does not answer"):
        arena_judge(chosen, answers, tmp_path, judge_of(stub), PROMPT, quiet=True)
    stub.faults.down_after = None
    verdicts, who = arena_judge(chosen, answers, tmp_path, judge_of(stub), PROMPT, quiet=True)
    assert who.answered == {ANSWERED_AS: 8}
    # The judge is fair to both places, so the second game's verdict is the first one's mirror image.
    mirror = {"A>>B": "B>>A", "A>B": "B>A", "A=B": "A=B", "B>A": "A>B", "B>>A": "A>>B"}
    assert [mirror[str(first)] for first, _ in verdicts.values()] == [second for _, second in verdicts.values()]
    first = [body["messages"][1]["content"] for _, body in stub.requests if "Say 0" in str(body)]
    assert any(text.index("base 0") > text.index("Assistant B") for text in first)


def test_a_judgment_without_verdict_is_asked_for_once_more(stub: Stub, tmp_path: Path) -> None:
    stub.faults.no_label = 2.0
    chosen, answers = instructions(2), collect(stub, tmp_path, 2)
    stub.requests.clear()
    verdicts, _ = arena_judge(chosen, answers, tmp_path, judge_of(stub), PROMPT, quiet=True)
    assert list(verdicts.values()) == [[None, None], [None, None]]
    assert len(stub.requests) == 8


def test_prompts_are_filled_once() -> None:
    messages = PROMPT.messages("{ANSWER_A} {x}", "{ANSWER_B}", "b {QUESTION}")
    assert messages[0]["content"] == "Judge {them}."
    assert messages[1]["content"].startswith("{ANSWER_A} {x}<|The Start of Assistant A's Answer|>\n{ANSWER_B}\n")
    assert messages[1]["content"].endswith("b {QUESTION}\n<|The End")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_prompt_and_no_key_goes_to_another_host(status: int, tmp_path: Path) -> None:
    """Nor to another port of the same one: whoever is named gets the requests, nobody else."""
    with faulty() as first, faulty() as other:
        first.fault = says(status, b"", Location=f"{other.url}/completions")
        endpoint = Endpoint("--endpoint", first.url, QUICK, key="the server's key")
        with pytest.raises(UserError, match=rf"says {status} and redirects to {other.url}.*no prompt is sent"):
            endpoint.post("completions", {"prompt": [1], "max_tokens": 1}, lambda reply: reply)
        with pytest.raises(UserError, match="redirects"):
            endpoint.served_models()
        assert len(first.asked) == 2
        assert not other.asked


def test_a_netrc_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would replace the key, and go to whoever is named."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password from-netrc\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    seen: list[str | None] = []

    class Handler(JsonHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization"))
            self.send_json(200, {"data": []})

    with serve(Handler) as url:
        Endpoint("--endpoint", url, QUICK).served_models()
        Endpoint("--endpoint", url, QUICK, key="own").served_models()
    assert seen == [None, "Bearer own"]


@pytest.mark.parametrize("key", ["with\nnewline", "k\u00e9y", "\u2028"])
def test_a_key_that_no_header_holds_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="MY_KEY holds characters that no key has") as caught:
        Endpoint("--endpoint", "http://localhost:1", QUICK, key=key, key_variable="MY_KEY")
    assert key not in str(caught.value)
