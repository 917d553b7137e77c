"""Judges, servers, functions and files as scorers, against a server whose answers are written here."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.answers.endpoint import Endpoint, Limits
from nemo_lmpo.answers.journal import Journal
from nemo_lmpo.answers.judge import JudgeServer
from nemo_lmpo.answers.replies import ReplyError, parse_score
from nemo_lmpo.data.tokenizer import load_tokenizer
from nemo_lmpo.errors import ConfigError, DataError, UserError
from nemo_lmpo.pairs.candidate import Answered, AskedPrompt, Candidate
from nemo_lmpo.pairs.score import NO_VERDICT, NOT_FINITE, REFUSED, Keep, Scorer, collect_scores
from nemo_lmpo.pairs.scorers.conversation import rendering
from nemo_lmpo.pairs.scorers.file import read_scores
from nemo_lmpo.pairs.scorers.function import open_function
from nemo_lmpo.pairs.scorers.judge import JudgeScorer
from nemo_lmpo.pairs.scorers.judge_prompts import judge_prompt
from nemo_lmpo.pairs.scorers.server import ServerScorer
from tests.answering_server import Reply, serving_answers
from tests.unit.pairs.models import save_reward_model

LIMITS = Limits(concurrency=2, retries=0, backoff=0.01)
TEXTS = {"13": "good", "21": "bad", "42": "middling"}
QUALITY = {"good": 7, "middling": 5, "bad": 2}


@dataclass
class Server:
    """Answers as its function says."""

    answers: Callable[[dict[str, Any]], Reply]
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint("--judge-endpoint", self.url, LIMITS)


def answered(count: int = 2, **row: Any) -> list[Answered]:
    return [
        Answered(
            AskedPrompt(f"p{place}", [{"role": "user", "content": f"question {place}"}], row={"n": place, **row}),
            [Candidate(f"p{place}/{seed}", 0, int(seed), text, 1, True) for seed, text in TEXTS.items()],
        )
        for place in range(count)
    ]


def found(scorer: Scorer, folder: Path, prompts: list[Answered]) -> dict[str, float | None]:
    folder.mkdir(exist_ok=True)
    scored = collect_scores(prompts, scorer, folder, quiet=True)
    return {one.name: one.score for each in scored for one in each.candidates}


def reasons(folder: Path) -> set[str | None]:
    with Journal(folder / "scores.jsonl", "id") as journal:
        return {row.get("why") for row in journal.rows.values()}


def chat(text: str, tops: dict[str, float] | None = None) -> Reply:
    logprobs = {"content": [{"top_logprobs": [{"token": t, "logprob": p} for t, p in (tops or {}).items()]}]}
    choice = {"message": {"content": text}, "finish_reason": "stop", "logprobs": logprobs if tops else None}
    return 200, {"model": "judge-1", "choices": [choice]}


def judge(server: Server, folder: Path, mode: str, path: Path | None = None) -> JudgeScorer:
    return JudgeScorer(JudgeServer(server.endpoint, "judge"), judge_prompt(mode, path), folder / "judge_calls.jsonl")


def graded(body: dict[str, Any]) -> Reply:
    said = body["messages"][0]["content"]
    quality = next(value for word, value in QUALITY.items() if f"\n{word}\n" in said)
    tops = {str(quality): math.log(0.6), f" {quality + 1}": math.log(0.2), "x": math.log(0.1), "0": -3.0}
    return chat(str(quality), tops)


def test_grades_are_expected_digits(tmp_path: Path) -> None:
    with serving_answers(Server(graded)) as server:
        scores = found(judge(server, tmp_path, "pointwise"), tmp_path, answered())
        assert scores["p0/13"] == pytest.approx((0.6 * 7 + 0.2 * 8) / 0.8)
        assert scores["p1/21"] == pytest.approx((0.6 * 2 + 0.2 * 3) / 0.8)
        body = server.asked[0]
        assert (body["top_logprobs"], body["max_tokens"], body["temperature"]) == (20, 1, 0)
        assert {"top_p", "top_k", "min_p", "repetition_penalty"} <= set(body)
        asked = len(server.asked)
        assert asked == 6
        assert found(judge(server, tmp_path, "pointwise"), tmp_path, answered()) == scores
        assert len(server.asked) == asked


def test_a_judge_that_refuses_some_and_says_nothing_of_others(tmp_path: Path) -> None:
    def answers(body: dict[str, Any]) -> Reply:
        said = body["messages"][0]["content"]
        if "question 0" in said and "\nbad\n" in said:
            return 400, {"error": {"code": "content_filter", "message": "no"}}
        if "question 1" in said and "\nbad\n" in said:
            return chat("?", {"?": -0.1})
        return graded(body)

    with serving_answers(Server(answers)) as server:
        for _ in range(2):
            scores = found(judge(server, tmp_path, "pointwise"), tmp_path, answered())
            assert [name for name, score in scores.items() if score is None] == ["p0/21", "p1/21"]
        assert len(server.asked) == 6
    assert reasons(tmp_path) == {None, REFUSED, NO_VERDICT}


def test_a_judge_without_probabilities_is_told_apart(tmp_path: Path) -> None:
    with (
        serving_answers(Server(lambda body: chat("7"))) as server,
        pytest.raises(UserError, match="the judge returns no top_logprobs"),
    ):
        found(judge(server, tmp_path, "pointwise"), tmp_path, answered())


def biased(body: dict[str, Any]) -> Reply:
    """Prefers the better answer; of `good` and `middling` always the first, so both orders make it a tie."""
    said = body["messages"][0]["content"]
    first = said.split("[Answer A]\n")[1].split("\n")[0]
    second = said.split("[Answer B]\n")[1].split("\n")[0]
    if {first, second} == {"good", "middling"}:
        return chat("Hm. [[A]]")
    return chat(f"First [[C]], no: [[{'A' if QUALITY[first] > QUALITY[second] else 'B'}]]")


def test_games_in_both_orders_with_ties(tmp_path: Path) -> None:
    with serving_answers(Server(biased)) as server:
        scores = found(judge(server, tmp_path, "pairwise"), tmp_path, answered(1))
        # Four games each: good and middling win two against bad, and one of two against each other.
        assert scores == {"p0/13": 0.75, "p0/42": 0.75, "p0/21": 0.0}
        assert len(server.asked) == 6


def test_what_a_judge_said_is_not_asked_again(tmp_path: Path) -> None:
    lock, served = threading.Lock(), [0]

    def fails_then(body: dict[str, Any]) -> Reply:
        with lock:
            served[0] += 1
            return biased(body) if served[0] <= 7 else (503, {})

    with serving_answers(Server(fails_then)) as server, pytest.raises(UserError, match="the same command resumes"):
        found(judge(server, tmp_path, "pairwise"), tmp_path, answered(3))
    with Journal(tmp_path / "judge_calls.jsonl", "call") as journal:
        kept = set(journal.rows)
    assert len(kept) == 7
    with serving_answers(Server(biased)) as server:
        scores = found(judge(server, tmp_path, "pairwise"), tmp_path, answered(3))
        assert len(server.asked) == 18 - 7
        whole = found(judge(server, tmp_path / "whole", "pairwise"), tmp_path / "whole", answered(3))
    assert scores == whole


def test_the_judges_prompt_is_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("Q {prompt} A {answer} {prompt}")
    body = judge_prompt("pointwise", path).request("m", answered(1)[0].prompt, "it says {prompt}")
    assert body["messages"][0]["content"] == "Q question 0 A it says {prompt} question 0"
    with pytest.raises(ConfigError, match=r"lacks \{answer_a\}"):
        judge_prompt("pairwise", path)
    with pytest.raises(ConfigError, match="cannot be read"):
        judge_prompt("pairwise", tmp_path / "nothing")


@pytest.mark.parametrize(
    ("path", "row"),
    [
        ("score", {"score": 1.5}),
        ("classify", {"label": "LABEL_0", "probs": [1.5]}),
        ("pooling", {"data": [1.5]}),
        ("pooling", {"data": [[0.1], [0.2], [1.5]]}),  # of every token
    ],
)
def test_scoring_servers(path: str, row: dict[str, Any], tmp_path: Path) -> None:
    with serving_answers(Server(lambda body: (200, {"data": [row]}))) as server:
        scores = found(ServerScorer(server.endpoint, "rm", path, None), tmp_path, answered(1))
        assert set(scores.values()) == {1.5}
        bodies = server.asked
    if path == "score":
        assert {(body["text_1"], body["text_2"]) for body in bodies} == {("question 0", text) for text in QUALITY}
    else:
        assert {body["messages"][-1]["content"] for body in bodies} == set(QUALITY)
        assert {body["messages"][-1]["role"] for body in bodies} == {"assistant"}


def test_a_scoring_server_gets_the_reward_models_own_token_ids(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_reward_model(tmp_path / "rm")))
    prompts = [
        Answered(
            AskedPrompt("p", [{"role": "user", "content": "sort b a"}]),
            [Candidate(f"p/{text}", 0, 1, text, 1, True) for text in ("a b", "b a")],
        )
    ]
    with serving_answers(Server(lambda body: (200, {"data": [{"data": [float(sum(body["input"]))]}]}))) as server:
        scores = found(
            ServerScorer(server.endpoint, "rm", "pooling", rendering(tokenizer, None, 99, "rm")), tmp_path, prompts
        )
    for text in ("a b", "b a"):
        messages = [*prompts[0].prompt.messages, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert scores[f"p/{text}"] == sum(ids)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"data": []},
        {"data": [{"score": 1}, {"score": 2}]},
        {"data": [{"data": [1, 2]}]},
        {"data": [{"score": "x"}]},
    ],
)
def test_replies_without_one_score_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ReplyError):
        parse_score(content)


def by_length(prompt: str, answers: list[str]) -> list[float]:
    return [float(len(answer)) for answer in answers]


def with_row(prompt: str, answers: list[str], row: dict[str, Any]) -> list[float]:
    return [row["n"] + len(answer) for answer in answers]


def infinite(prompt: str, answers: list[str]) -> list[float]:
    return [math.inf if "0" in prompt else math.nan, 1.0, 2.0]


def too_few(prompt: str, answers: list[str]) -> list[float]:
    return [1.0]


def broken(prompt: str, answers: list[str]) -> list[float]:
    raise KeyError("oh")


def texts(prompt: str, answers: list[str]) -> list[str]:
    return ["much", "little", "x"]


def function(name: str, prompts: list[Answered]) -> Scorer:
    return open_function(f"{__name__}:{name}", [one.prompt for one in prompts])


def test_functions(tmp_path: Path) -> None:
    prompts = answered()
    assert found(function("by_length", prompts), tmp_path / "a", prompts)["p0/42"] == 8.0
    assert found(function("with_row", prompts), tmp_path / "b", prompts)["p1/42"] == 9.0
    other = answered(2, gold="x")
    assert function("with_row", prompts).identity() != function("with_row", other).identity()
    assert function("by_length", prompts).identity() == function("by_length", other).identity()
    scores = found(function("infinite", prompts), tmp_path / "c", prompts)
    assert [name for name, score in scores.items() if score is None] == ["p0/13", "p1/13"]
    assert reasons(tmp_path / "c") == {None, NOT_FINITE}
    file = tmp_path / "own.py"
    file.write_text("def reward(prompt, answers):\n    return range(len(answers))\n")
    scorer = open_function(f"{file}:reward", [one.prompt for one in prompts])
    assert found(scorer, tmp_path / "d", prompts)["p0/42"] == 2.0
    before = scorer.identity()
    file.write_text("def reward(prompt, answers):\n    return [1 for _ in answers]\n")
    assert open_function(f"{file}:reward", []).identity() != before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("too_few", "returns 1 scores for 3 answers of prompt p0"),
        ("broken", r"fails on prompt p0 \(KeyError: 'oh'\)"),
        ("texts", r"fails on prompt p0 \(ValueError"),
    ],
)
def test_functions_that_fail(name: str, said: str, tmp_path: Path) -> None:
    prompts = answered()
    with pytest.raises(UserError, match=said):
        found(function(name, prompts), tmp_path, prompts)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("no_such_module_here:f", r"cannot be imported .*FILE.py:FUNCTION"),
        ("math", "is not MODULE:FUNCTION"),
        ("math:nothing", "math has no function nothing"),
        ("math:pi", "math has no function pi"),
        ("nowhere.py:f", "nowhere.py does not exist"),
    ],
)
def test_functions_that_are_not_there(given: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        open_function(given, [])


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "scores"
    names = [f"p{place}/{seed}" for place in range(2) for seed in TEXTS]
    path.write_text("".join(f'{{"id": "{name}", "score": {place}}}\n' for place, name in enumerate(names)))
    assert found(read_scores(path), tmp_path / "a", answered()) == {name: i for i, name in enumerate(names)}
    with pytest.raises(DataError, match="has no score for 3 answers, the first p2/13"):
        found(read_scores(path), tmp_path / "b", answered(3))
    path.write_text('{"id": "p0/13", "score": 1}\n{"id": "p0/13", "score": "x"}\n')
    with pytest.raises(DataError, match="row 2 has not the form"):
        read_scores(path)
    path.write_text("")
    with pytest.raises(DataError, match="holds no scores"):
        read_scores(path)


def test_not_one_score(tmp_path: Path) -> None:
    prompts = answered()
    with pytest.raises(DataError, match=r"none of 6 answers has a score \(not finite\)"):
        found(function("never", prompts), tmp_path, prompts)


def never(prompt: str, answers: list[str]) -> list[float]:
    return [math.nan] * len(answers)


def test_another_scorer_is_refused(tmp_path: Path) -> None:
    prompts = answered()
    found(function("by_length", prompts), tmp_path, prompts)
    with pytest.raises(ConfigError, match=r"holds scores with reward .*by_length, this one has .*with_row"):
        found(function("with_row", prompts), tmp_path, prompts)


def test_scores_are_kept_from_any_thread(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", "id") as journal:
        keep = Keep(journal, lambda _: None)
        threads = [threading.Thread(target=keep, args=({f"{n}": float(n)},)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(journal.rows) == 8
