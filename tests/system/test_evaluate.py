"""Evaluations as whole commands, with the real scoring packages and a stub in the place of servers and judges."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.evaluate.__main__ import main
from nemo_lmpo.evaluate.data_files import load_set
from nemo_lmpo.evaluate.environment import VARIABLE
from nemo_lmpo.evaluate.suites import TASKS
from tests.system.stub_server import ANSWERED_AS, Stub, quality, serving
from tests.system.task_rows import write_task_rows
from tests.system.test_credentials import BASIC, TOKEN, assert_nothing_left, with_credentials

pytestmark = [
    pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"set {VARIABLE} (make eval-env)"),
    pytest.mark.timeout(1200),  # the scoring packages take their time on machines that do other things, too
]

Command = Callable[..., int]
JUDGE_PROMPT = {
    "system": "Judge.",
    "template": "{QUESTION}\n<|The Start of Assistant A's Answer|>\n{ANSWER_A}\n<|The End of Assistant A's Answer|>\n"
    "<|The Start of Assistant B's Answer|>\n{ANSWER_B}\n<|The End of Assistant B's Answer|>",
}


@pytest.fixture(scope="module")
def data(shared_dir: Path) -> Path:
    folder = shared_dir / "evaluation"
    if not (folder / "alpaca_eval2_eval_set.json.gz").exists():
        pytest.skip("the folder `shared` has no evaluation data")
    return folder


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving() as running:
        yield running


@pytest.fixture
def command(data: Path, stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a suite's command on ten instructions with the stub as judge, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps(JUDGE_PROMPT))

    def run(suite: str, *more: str, limit: int = 10) -> int:
        shared = ["--data", str(data), "--judge-endpoint", stub.url, "--retries", "1", "--quiet", "--output", "out"]
        extra = ["--bootstrap", "20"] if suite == "alpaca_eval" else ["--judge-prompt", str(prompt)]
        return main([suite, *shared, *extra, "--limit", str(limit), *more])

    return run


def result_of(suite: str, folder: Path = Path("out")) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / suite / "result.json").read_text())
    return result


def test_published_rows_are_recomputed(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--data", str(data)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("ok     AlpacaEval 2") for line in lines) == 36
    assert any("Mistral-7B-Instruct-v0.2" in line and "LC 17.11" in line for line in lines)
    assert any("Llama-3-Instruct-8B-SimPO" in line and "LC 44.65" in line for line in lines)
    assert lines[-1].startswith("41 of 41 rows agree")


def test_a_wrong_row_fails_the_check(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in data.iterdir():
        (tmp_path / path.name).symlink_to(path)
    table = tmp_path / "alpaca_eval2_glm_weights.csv"
    text = table.read_text()
    table.unlink()
    assert text.count("-0.1621386599809119") == 1  # what the SimPO row's LC is made of
    table.write_text(text.replace("-0.1621386599809119", "-0.1721386599809119"))
    for name in ("alpaca_eval2_preferences_and_lengths.csv.gz", "arena_hard_v0.1_question.jsonl.gz"):
        (tmp_path / name).unlink()
    assert main(["check", "--data", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "DIFFERS GLM weights  Llama-3-Instruct-8B-SimPO" in out
    assert "left out: " in out
    assert "2 of 3 rows agree" in out


def test_alpaca_eval_through_kills_of_both_servers(
    command: Command, stub: Stub, smollm2_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", str(smollm2_dir), "--row", "tiny/LMPO", "--endpoint", stub.url)
    stub.faults.down_after = 4  # while generating
    assert command("alpaca_eval", *arguments) == 1
    assert "does not answer" in capsys.readouterr().err
    answered = len(Path("out/alpaca_eval/answers.jsonl").read_text().splitlines())
    assert 0 < answered <= 4
    stub.requests.clear()
    stub.faults.down_after = 10 - answered + 3  # while judging
    assert command("alpaca_eval", *arguments) == 1
    judged = len(Path("out/alpaca_eval/judge_calls.jsonl").read_text().splitlines())
    assert 0 < judged <= 3
    stub.requests.clear()
    stub.faults.down_after = None
    assert command("alpaca_eval", *arguments) == 0
    assert stub.count("/v1/completions") == 0
    assert stub.count("/v1/chat/completions") == 10 - judged
    prompts = [body["messages"][-1]["content"] for path, body in stub.requests if "chat" in path]
    assert all("## Instruction" in prompt for prompt in prompts)  # the package's own prompt
    found = result_of("alpaca_eval")
    assert (found["n"], found["of"], found["judge"]["answered"]) == (10, 805, {ANSWERED_AS: 10})
    assert found["generation"]["temperature"] == 0.7  # the suite's own
    # The stub's rule, applied by hand to what was answered: a win is 1 / (1 + exp(-6 difference)).
    check_wins(found)
    stub.requests.clear()
    assert command("alpaca_eval", *arguments) == 0
    assert not stub.requests  # complete: nothing is asked


def check_wins(found: dict[str, Any], folder: Path = Path("out")) -> None:
    import gzip
    import math

    shared = Path(__file__).resolve().parent.parent.parent.parent / "shared" / "evaluation"
    every = json.loads(gzip.decompress((shared / "alpaca_eval2_eval_set.json.gz").read_bytes()))
    rows = [json.loads(line) for line in (folder / "alpaca_eval" / "answers.jsonl").read_text().split("\n") if line]
    wins = [
        1 / (1 + math.exp(-6 * (quality(row["output"]) - quality(every[int(row["id"])]["output"])))) for row in rows
    ]
    assert found["values"]["wr"]["value"] == pytest.approx(100 * sum(wins) / len(wins), abs=1e-6)
    lengths = [len(row["output"]) for row in rows]
    assert found["values"]["length"]["value"] == pytest.approx(sum(lengths) / len(lengths))


def test_more_instructions_go_on_from_fewer(command: Command, stub: Stub, smollm2_dir: Path) -> None:
    model = ("--model", str(smollm2_dir))
    assert command("arena_hard", *model, "--endpoint", stub.url, limit=3) == 0
    stub.requests.clear()
    with serving() as other:  # as in the next job: the same model at another address
        assert command("arena_hard", *model, "--endpoint", other.url, limit=5) == 0
        assert other.count("/v1/completions") == 2
    assert stub.count("/v1/chat/completions") == 4
    assert result_of("arena_hard")["n"] == 5


def test_arena_hard_of_an_anchor(command: Command, stub: Stub, data: Path) -> None:
    question = load_set("arena_hard", data).instructions[17].text
    stub.faults.refuse = f"{question}\n<|The Start"  # one refused question ends nothing
    assert command("arena_hard", "--anchor", "gpt-3.5-turbo-0125", limit=500) == 0
    found = result_of("arena_hard")
    assert found["values"]["length"]["value"] == pytest.approx(329.728)  # cl100k tokens, as published
    assert found["model"]["published"]["wr"] == 23.34
    assert sum(found["details"]["verdicts"].values()) == 1000
    assert (found["unparsed"], found["judge"]["refused"], found["details"]["verdicts"]["None"]) == (2, 2, 2)
    assert found["judge"]["answered"] == {ANSWERED_AS: 998}
    assert len(found["values"]["wr"]["intervals"]) == 2
    assert main(["tables", "out", "--output", "page"]) == 0
    assert "gpt-3.5-turbo-0125" in Path("page/tables.html").read_text()


@pytest.fixture(scope="module")
def mixture_dir(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random mixture of experts with SmolLM2's tokenizer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("mixture") / "hf"
    shutil.copytree(smollm2_dir, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "head_dim": 8}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    config = Qwen3MoeConfig(vocab_size=49152, max_position_embeddings=2048, **sizes, **heads, **experts)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model", ["smollm2_dir", "mixture_dir"])
def test_answers_in_process(command: Command, model: str, request: pytest.FixtureRequest) -> None:
    # Of the two suites the one whose scoring takes no process; sampled as in the other.
    arguments: tuple[str, ...] = (
        "--model",
        str(request.getfixturevalue(model)),
        "--max-new-tokens",
        "6",
        "--batch-size",
        "2",
        "--device",
        "cpu",
    )
    arguments += ("--temperature", "0.7")
    assert command("arena_hard", *arguments, limit=4) == 0
    found = result_of("arena_hard")
    assert found["truncated"] == 4
    assert found["generation"]["backend"].startswith("transformers ")
    assert (found["generation"]["temperature"], found["generation"]["dtype"]) == (0.7, "fp32")
    answers = Path("out/arena_hard/answers.jsonl").read_text()
    # Cut in the middle, as by a kill: the same answers come again.
    Path("out/arena_hard/answers.jsonl").write_text(answers[: len(answers) // 2])
    Path("out/arena_hard/result.json").unlink()
    assert command("arena_hard", *arguments, limit=4) == 0
    again = Path("out/arena_hard/answers.jsonl").read_text()
    assert sorted(again.splitlines()) == sorted(answers.splitlines())


def test_judges_that_cannot_be_used(
    command: Command, stub: Stub, smollm2_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", str(smollm2_dir), "--endpoint", stub.url)
    stub.faults.no_logprobs = True
    assert command("alpaca_eval", *arguments) == 1
    assert "returns no top_logprobs" in capsys.readouterr().err
    stub.faults.no_logprobs = False
    stub.faults.no_label = 2.0
    (_, refused) = next(request for request in stub.requests if "chat" in request[0])
    stub.faults.refuse = refused["messages"][-1]["content"]
    assert command("alpaca_eval", *arguments) == 1
    assert "gave no verdict in 10 of 10 answers (1 of them it declined to give), more than" in capsys.readouterr().err
    assert not Path("out/alpaca_eval/result.json").exists()
    assert command("arena_hard", *arguments) == 1
    assert "gave no verdict in 20 of 20" in capsys.readouterr().err


def test_folders_are_not_mixed(
    command: Command, stub: Stub, smollm2_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", str(smollm2_dir), "--endpoint", stub.url)
    assert command("arena_hard", *arguments, limit=2) == 0
    assert command("arena_hard", *arguments, "--temperature", "1", limit=2) == 1
    assert "choose another --output" in capsys.readouterr().err
    assert command("arena_hard", "--anchor", "gpt-3.5-turbo-0125", limit=2) == 1
    assert "choose another --output" in capsys.readouterr().err
    # Another name or row is not an other evaluation.
    assert command("arena_hard", *arguments, "--row", "tiny/SimPO", limit=2) == 0
    assert result_of("arena_hard")["model"]["method"] == "SimPO"


@pytest.fixture(scope="module")
def harness() -> Path:
    code = "import lm_eval; print(lm_eval.__path__[0])"
    done = subprocess.run([os.environ[VARIABLE], "-c", code], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


@dataclass
class Ten:
    """What two commands made of a leaderboard's ten tasks: those of the first version, then all."""

    folder: Path
    """With the tasks' `rows` and the results in `out`."""
    requests: list[tuple[str, dict[str, Any]]]
    """To the server."""
    first: int
    """How many of them were of the first command."""


@pytest.fixture(scope="module")
def ten(smollm2_dir: Path, harness: Path, tmp_path_factory: pytest.TempPathFactory) -> Ten:
    folder = tmp_path_factory.mktemp("ten")
    write_task_rows(folder / "rows", harness)
    with serving() as stub:
        url = with_credentials(stub.url, query=True)
        arguments = ["leaderboard", "--model", str(smollm2_dir), "--row", "tiny/LMPO", "--endpoint", url]
        arguments += ["--task-data", str(folder / "rows"), "--output", str(folder / "out"), "--quiet"]
        assert main([*arguments, "--tasks", "v1"]) == 0
        first = len(stub.requests)
        assert main(arguments) == 0
        assert set(stub.credentials) == {(BASIC, f"api_key={TOKEN}")}
    assert_nothing_left(folder / "out")
    return Ten(folder, stub.requests, first)


def test_ten_tasks_by_their_own_definitions(ten: Ten) -> None:
    found = result_of("leaderboard", ten.folder / "out")
    assert set(found["values"]) == {task.name for task in TASKS}
    assert found["details"]["tasks"]["arc"]["shots"] == 25
    # Tasks of the first command were not run again.
    again = [body for _, body in ten.requests[ten.first :] if "stop" in body and "Question:" in body["stop"]]
    assert ten.first
    assert not again
    # GSM8K was stopped as the paper's harness does it, and as today's.
    stops = [tuple(body["stop"][:3]) for _, body in ten.requests if "stop" in body and "Question:" in body["stop"]]
    assert {":" in stop for stop in stops} == {True, False}
    assert all(isinstance(token, int) for body in ten.requests[:1] for token in body[1]["prompt"][0])
    assert main(["tables", str(ten.folder / "out"), "--output", str(ten.folder / "page")]) == 0
    assert "LMPO here" in (ten.folder / "page" / "tables.md").read_text()


def test_scores_are_the_harness_own(stub: Stub, ten: Ten, smollm2_dir: Path, harness: Path, tmp_path: Path) -> None:
    """One task by `lm_eval` itself, without this project."""
    task = tmp_path / "own.yaml"
    rows = ten.folder / "rows"
    files = {"train": str(rows / "winogrande.fewshot.jsonl"), "validation": str(rows / "winogrande.jsonl")}
    task.write_text(
        f"include: {harness}/tasks/winogrande/default.yaml\ntask: own\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {json.dumps({'data_files': files})}\n"
    )
    # What its command line does, but for an index of all the tasks that it comes with.
    code = (
        "import sys, lm_eval; from lm_eval.tasks import TaskManager\n"
        "found = lm_eval.simple_evaluate('local-completions', sys.argv[1], [sys.argv[2]], num_fewshot=5,\n"
        "    bootstrap_iters=0, task_manager=TaskManager(include_defaults=False))\n"
        "print('own', found['results']['own']['acc,none'])"
    )
    model = f"model=stub,base_url={stub.url}/completions,tokenizer={smollm2_dir},max_length=2048"
    done = subprocess.run(
        [os.environ[VARIABLE], "-W", "ignore", "-c", code, model, str(task)],
        check=True,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    expected = 100 * float(done.stdout.split("own ")[-1])
    ours = result_of("leaderboard", ten.folder / "out")["values"]["winogrande"]["value"]
    assert ours == pytest.approx(expected)
