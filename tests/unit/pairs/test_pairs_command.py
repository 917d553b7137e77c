"""The whole command: killed at every write, over a server, on bad input, and read by training."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.answers.journal import Journal
from nemo_lmpo.answers.sampling import NEUTRAL
from nemo_lmpo.config.row_fields import ABOUT_OWN_PAIRS
from nemo_lmpo.config.schema import DataConfig, DatasetConfig
from nemo_lmpo.data.builtin.tiny_tokenizer import tiny_tokenizer
from nemo_lmpo.data.preference import load_preference_dataset
from nemo_lmpo.data.read import open_source
from nemo_lmpo.errors import ConfigError, DataError, UserError
from nemo_lmpo.pairs import run as pairs_run
from nemo_lmpo.pairs.__main__ import main
from nemo_lmpo.pairs.run import make_pairs
from nemo_lmpo.runtime import files
from tests.answering_server import Reply, serving_answers
from tests.unit.pairs.models import options, save_policy, save_reward_model

OUTPUT = ("pairs.jsonl", "pairs.json", "report.html", "README.md")
FUNCTION = f"{__name__}:longer"
calls: list[str] = []


def longer(prompt: str, answers: list[str]) -> list[float]:
    """A reward that is noted when it is called."""
    calls.append(prompt)
    return [float(len(answer)) for answer in answers]


class KilledError(BaseException):
    """Ends the command as a kill does: nothing of it runs after a write that was cut in half."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy") / "policy")


@pytest.fixture(scope="module")
def whole(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs that were made at once, by a reward model."""
    folder = tmp_path_factory.mktemp("whole")
    reward = save_reward_model(folder / "rm")
    make_pairs(options(policy, folder / "pairs", "--samples", "3", "--reward-model", str(reward)))
    return folder


def test_what_is_in_the_folder(whole: Path) -> None:
    summary = json.loads((whole / "pairs" / "pairs.json").read_text())
    rows = [json.loads(line) for line in (whole / "pairs" / "pairs.jsonl").read_text().splitlines()]
    assert summary["seeds"] == [13, 21, 42]
    assert (summary["sampling"]["temperature"], summary["sampling"]["top_p"]) == (0.8, 0.95)
    assert summary["counts"]["answers"] == 18
    assert summary["counts"]["pairs"] == len(rows) >= 3
    assert summary["counts"]["prompts"] == len(rows) + sum(summary["counts"]["prompts_left_out"].values())
    for row in rows:
        usable = {one["text"]: one for one in row["candidates"] if one["finished"] and one["score"] is not None}
        best, worst = (pick(usable.values(), key=lambda one: one["score"]) for pick in (max, min))
        assert (row["chosen"], row["rejected"]) == (best["text"], worst["text"])
        assert row["tokens_chosen"] == len(tiny_tokenizer()(best["text"], add_special_tokens=False)["input_ids"])
    assert {path.name for path in (whole / "pairs" / "figures").iterdir()} == {
        *("scores.png", "lengths.png", "length_and_score.png")
    }
    page = (whole / "pairs" / "report.html").read_text()
    assert page.count("data:image/png") == 3
    assert "the chosen answer is the longer one" in page
    card = (whole / "pairs" / "README.md").read_text()
    assert str(whole.parent) not in card + json.dumps(summary)  # no path of this machine


def test_training_reads_the_folder(whole: Path, tmp_path: Path) -> None:
    config = DataConfig(cache_dir=str(tmp_path), max_length=128, max_prompt_length=32)
    rows = [json.loads(line) for line in (whole / "pairs" / "pairs.jsonl").read_text().splitlines()]
    for path in (whole / "pairs", whole / "pairs" / "pairs.jsonl"):
        data = load_preference_dataset(config, DatasetConfig(path=str(path)), tiny_tokenizer())
        assert len(data) == len(rows)
        decoded = [
            tiny_tokenizer().decode(data[place].responses[0].ids, skip_special_tokens=True) for place in range(3)
        ]
        assert sorted(map(str.strip, decoded)) == sorted(row["chosen"] for row in rows[:3])
        assert not data.summary.columns  # each column of ours is known
    strict = replace(config, on_unused_fields="error")
    assert len(load_preference_dataset(strict, DatasetConfig(path=str(whole / "pairs")), tiny_tokenizer())) == len(rows)
    assert {*rows[0]} == {"prompt_id", "prompt", "chosen", "rejected", *ABOUT_OWN_PAIRS}
    # A column of another set that has the name of one of ours is told of as before.
    other = [{**row, "candidates": "x"} for row in rows]
    del other[0]["tokens_chosen"]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    data = load_preference_dataset(config, DatasetConfig(path=str(tmp_path / "other.jsonl")), tiny_tokenizer())
    assert data.summary.columns == dict.fromkeys(("candidates", "score_chosen", "score_rejected", "tokens_rejected"), 1)


def test_what_is_noted_beside_the_pairs_is_not_their_content(whole: Path, tmp_path: Path) -> None:
    """A run resumes on the same pairs whatever became of the model's files, whose times `work/` notes."""
    shutil.copytree(whole / "pairs", tmp_path / "pairs")
    before = open_source(str(tmp_path / "pairs"), "train").fingerprint
    (tmp_path / "pairs" / "work" / "weights_0.json").write_text("{}")
    (tmp_path / "pairs" / "report.html").write_text("drawn anew")
    assert open_source(str(tmp_path / "pairs"), "train").fingerprint == before
    with (tmp_path / "pairs" / "pairs.jsonl").open("a") as file:
        file.write("\n")
    assert open_source(str(tmp_path / "pairs"), "train").fingerprint != before


def test_parquet_holds_the_same(whole: Path, policy: Path, tmp_path: Path) -> None:
    import datasets

    arguments = ("--samples", "3", "--reward-model", str(whole / "rm"))
    expected = [json.loads(line) for line in (whole / "pairs" / "pairs.jsonl").read_text().splitlines()]
    make_pairs(options(policy, whole / "pairs", *arguments, "--format", "parquet"))
    assert not (whole / "pairs" / "pairs.jsonl").exists()
    assert datasets.Dataset.from_parquet(str(whole / "pairs" / "pairs.parquet")).to_list() == expected
    config = DataConfig(cache_dir=str(tmp_path), max_length=128, max_prompt_length=32)
    data = load_preference_dataset(config, DatasetConfig(path=str(whole / "pairs")), tiny_tokenizer())
    assert len(data) == len(expected)
    make_pairs(options(policy, whole / "pairs", *arguments))
    assert [json.loads(line) for line in (whole / "pairs" / "pairs.jsonl").read_text().splitlines()] == expected


class Kills:
    """Ends each command at its second write to a journal, or at the first write of a file that it never ended at.

    Of every second write to a journal half is there, and every second file.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on = True
        self.count = 0
        self.journal_writes = 0
        self.file_writes, self.file_to_kill = 0, 0
        write, replaced = Journal._write, files.replace_file

        def cut(journal: Journal, content: bytes) -> None:
            self.journal_writes += 1
            if self.on and self.journal_writes == 2:
                self._note()
                os.write(journal._file, content[: len(content) // 2 if self.count % 2 else len(content)])
                raise KilledError
            write(journal, content)

        def not_replaced(path: Path, content: str | bytes) -> None:
            self.file_writes += 1
            if self.on and self.file_writes == self.file_to_kill + 1:
                self.file_to_kill += 1
                self._note()
                if self.count % 2:
                    replaced(path, content)
                raise KilledError
            replaced(path, content)

        monkeypatch.setattr(Journal, "_write", cut)
        for module in ("runtime.files", "pairs.run", "pairs.page", "pairs.card"):
            monkeypatch.setattr(f"nemo_lmpo.{module}.replace_file", not_replaced)

    def _note(self) -> None:
        self.count += 1
        self.journal_writes = self.file_writes = 0


def test_kills_at_every_write_change_nothing(
    whole: Path, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {name: (whole / "pairs" / name).read_bytes() for name in OUTPUT}
    kills = Kills(monkeypatch)
    arguments = ("--samples", "3", "--reward-model", str(whole / "rm"))
    generated: list[int] = []
    from nemo_lmpo.answers.engine import Generator

    batches = Generator._batch

    def counted(self: Generator, ids: Any, *more: Any) -> Any:
        generated.append(len(ids))
        return batches(self, ids, *more)

    monkeypatch.setattr(Generator, "_batch", counted)
    folder = tmp_path / "pairs"
    for _ in range(60):
        try:
            make_pairs(options(policy, folder, *arguments))
            break
        except KilledError:
            kills.journal_writes = kills.file_writes = 0
    assert kills.count > 10
    assert kills.file_to_kill >= 8  # two settings, weights, three pictures, page, card, pairs and summary
    assert {name: (folder / name).read_bytes() for name in OUTPUT} == expected
    # Each kill while sampling costs one batch of four at most, and nothing that was kept is sampled again.
    assert sum(generated) <= 18 + 4 * 8
    kills.on = False
    generated.clear()
    make_pairs(options(policy, folder, *arguments))
    assert not generated


def test_stages_one_by_one(policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    make_pairs(options(policy, folder, "--samples", "4", "--until", "sample"))
    assert {path.name for path in (folder / "work").iterdir()} == {
        *("samples.jsonl", "sample_settings.json", "weights_0.json")
    }
    samples = [json.loads(line) for line in (folder / "work" / "samples.jsonl").read_text().splitlines()]
    own = tmp_path / "scores.jsonl"
    own.write_text("".join(json.dumps({"id": one["id"], "score": len(one["output"])}) + "\n" for one in samples))
    make_pairs(options(policy, folder, "--samples", "4", "--scores", str(own), "--until", "score"))
    assert not (folder / "pairs.jsonl").exists()
    make_pairs(options(policy, folder, "--samples", "4", "--scores", str(own)))
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert all(len(row["chosen"]) > len(row["rejected"]) for row in rows)
    before = (folder / "pairs.jsonl").read_bytes()
    # Another rule needs no model: pairs are chosen again from what is there.
    make_pairs(options(policy, folder, "--samples", "4", "--scores", str(own), "--length-control", "--rule", "top-k:2"))
    summary = json.loads((folder / "pairs.json").read_text())
    assert summary["rule"]["text"] == "top-k:2"
    assert abs(summary["statistics"]["correlation_length_controlled_score"]) < 0.5
    make_pairs(options(policy, folder, "--samples", "4", "--scores", str(own)))
    assert (folder / "pairs.jsonl").read_bytes() == before


def test_models_are_mixed(policy: Path, tmp_path: Path) -> None:
    other = save_policy(tmp_path / "other", seed=1)
    make_pairs(options([policy, other], tmp_path / "pairs", "--samples", "2", "--reward", FUNCTION))
    rows = [json.loads(line) for line in (tmp_path / "pairs" / "pairs.jsonl").read_text().splitlines()]
    assert [(one["model"], one["seed"]) for one in rows[0]["candidates"]] == [
        *(("policy", 13), ("policy", 21), ("other", 13), ("other", 21))
    ]
    assert (
        len(
            {model["weights_sha256"] for model in json.loads((tmp_path / "pairs" / "pairs.json").read_text())["models"]}
        )
        == 2
    )


@dataclass
class Model:
    """Completes prompts, and fails after so many answers."""

    most: int = 10**9
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)

    def answers(self, body: dict[str, Any]) -> Reply:
        if len(self.asked) > self.most:
            return 503, {"error": {"message": "out of order"}}
        words = " ".join("abcdefgh"[(body["seed"] >> shift) % 8] for shift in range(0, 3 + body["seed"] % 9))
        return 200, {
            "choices": [{"text": words, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": len(body["prompt"])},
        }


SERVED = ("--samples", "3", "--served-name", "m", "--retries", "0", "--concurrency", "3", "--reward", FUNCTION)


def test_a_server_that_dies_is_asked_for_the_rest(policy: Path, tmp_path: Path) -> None:
    with serving_answers(Model(most=7)) as server:
        given = options(policy, tmp_path / "pairs", *SERVED, "--endpoint", server.url)
        with pytest.raises(UserError, match=r"out of order.*the same command resumes"):
            make_pairs(given)
    kept = (tmp_path / "pairs" / "work" / "samples.jsonl").read_bytes().count(b"\n")
    assert kept == 7
    with serving_answers(Model()) as server:
        make_pairs(options(policy, tmp_path / "pairs", *SERVED, "--endpoint", server.url))
        assert len(server.asked) == 18 - kept
        make_pairs(options(policy, tmp_path / "whole", *SERVED, "--endpoint", server.url))
        body = server.asked[-1]
    assert (tmp_path / "pairs" / "pairs.jsonl").read_bytes() == (tmp_path / "whole" / "pairs.jsonl").read_bytes()
    assert set(NEUTRAL) | {"temperature", "seed", "max_tokens", "stop_token_ids", "prompt"} <= set(body)
    assert (body["temperature"], body["top_p"]) == (0.8, 0.95)
    seeds = {(tuple(one["prompt"]), one["seed"]) for one in server.asked}
    assert len(seeds) == len(server.asked) - (18 - kept)  # each prompt's three answers have seeds of their own
    expected = tiny_tokenizer().apply_chat_template(
        [{"role": "user", "content": "sort b a"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert body["prompt"][:1] == expected[:1]
    assert body["prompt"][-1:] == expected[-1:]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ")
    return said[-1]


@pytest.fixture
def base(policy: Path, tmp_path: Path) -> list[str]:
    return [
        *("--model", str(policy), "--output", str(tmp_path / "pairs"), "--quiet", "--prompts", "builtin:tiny"),
        *("--limit", "3", "--max-new-tokens", "40"),
    ]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "nothing scores the answers; give --reward-model, "),
        (["--reward", FUNCTION, "--scores", "x"], "--reward and --scores name several scorers"),
        (["--reward", FUNCTION, "--samples", "1"], "--samples 1 of one model gives fewer than two answers"),
        (["--reward", FUNCTION, "--samples", "0"], "--samples 0 must be at least 1"),
        (["--reward", FUNCTION, "--temperature", "0"], "--top-p and --top-k have no effect without --temperature"),
        (["--reward", FUNCTION, "--seeds", "1", "1"], "--seeds holds a seed twice"),
        (["--reward", FUNCTION, "--rule", "best"], "--rule 'best' is not a rule"),
        (["--reward", FUNCTION, "--max-length-ratio", "0.5"], "--max-length-ratio 0.5 must be at least 1"),
        (
            ["--reward", FUNCTION, "--endpoint", "http://127.0.0.1:9", "--retries", "0"],
            "127.0.0.1:9",
        ),
        (["--reward", FUNCTION, "--endpoint", "http://a", "--endpoint", "http://b"], "1 --model have 2 --endpoint"),
        (["--reward", FUNCTION, "--prompts", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--scores", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["--reward", "nowhere:f"], "--reward nowhere:f cannot be imported"),
        (["--reward-model", "nowhere"], "--reward-model nowhere does not exist"),
        (["--reward-model", "MODEL"], "--reward-model MODEL has 2 labels; a reward model has one (num_labels: 1)"),
        (["--reward-endpoint", "http://127.0.0.1:9", "--retries", "0"], "--reward-endpoint http://127.0.0.1:9"),
        (["--judge-endpoint", "http://127.0.0.1:9", "--retries", "0"], "--judge-endpoint http://127.0.0.1:9"),
    ],
)
def test_bad_input_is_one_sentence(
    base: list[str], more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is sampled."""
    more = [base[1] if word == "MODEL" else word for word in more]
    assert said.replace("MODEL", base[1]) in refused([*base, *more], capsys)
    assert not list(Path(base[3]).rglob("samples.jsonl"))


def function_file(folder: Path, value: str) -> str:
    """A reward that gives each answer this."""
    (folder / "own_reward.py").write_text(f"def own(prompt, answers):\n    return [{value} for answer in answers]\n")
    return f"{folder}/own_reward.py:own"


def test_a_scorer_is_corrected_and_the_same_command_goes_on(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a scorer that has kept no score, nothing binds; of one that has, the samples stay."""
    given, work = [*base, "--reward", function_file(tmp_path, "1 / 0")], tmp_path / "pairs" / "work"
    said = refused(given, capsys)
    assert "fails on prompt" in said
    assert "correct it and run the same command again" in said
    sampled = (work / "samples.jsonl").read_bytes()
    function_file(tmp_path, "float('nan')")
    said = refused(given, capsys)
    assert "answers has a score (not finite); correct the scorer, remove that file" in said
    function_file(tmp_path, "float(len(answer))")
    said = refused(given, capsys)
    assert "holds scores with code" in said
    assert "or remove scores.jsonl and judge_calls.jsonl there to score these answers anew" in said
    (work / "scores.jsonl").unlink()
    assert main(given) == 0
    assert (work / "samples.jsonl").read_bytes() == sampled


def test_an_endpoint_that_is_down_binds_to_nothing(
    base: list[str], policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing was sampled over it, so the same folder may be sampled in another way."""
    down = ["--endpoint", "http://127.0.0.1:9", "--served-name", "m", "--retries", "0"]
    assert "127.0.0.1:9" in refused([*base, "--reward", FUNCTION, *down], capsys)
    assert main([*base, "--reward", FUNCTION]) == 0


def test_scores_that_are_not_finite_are_counted(base: list[str], tmp_path: Path) -> None:
    reward = function_file(tmp_path, "float('inf') if answer.startswith(tuple('abcdefghi')) else float(len(answer))")
    assert main([*base, "--limit", "12", "--reward", reward]) == 0
    summary = json.loads((tmp_path / "pairs" / "pairs.json").read_text())
    scores = [json.loads(line) for line in (tmp_path / "pairs" / "work" / "scores.jsonl").read_text().splitlines()]
    not_finite = sum(row["score"] is None and row["why"] == "not finite" for row in scores)
    assert summary["counts"]["answers_left_out"]["without a score"] == not_finite > 0
    rows = [json.loads(line) for line in (tmp_path / "pairs" / "pairs.jsonl").read_text().splitlines()]
    assert not any(row[side].startswith(tuple("abcdefghi")) for row in rows for side in ("chosen", "rejected"))


def test_prompts_that_change_between_stages_are_refused(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "sort b a"}\n{"prompt": "sort d c"}\n')
    given = [*base, "--prompts", str(source), "--reward", FUNCTION]
    assert main([*given, "--until", "sample"]) == 0
    sampled = (tmp_path / "pairs" / "work" / "samples.jsonl").read_bytes()
    source.write_text('{"prompt": "sort b a"}\n{"prompt": "sort d e"}\n')
    assert "holds candidates with prompts" in refused(given, capsys)
    source.write_text('{"prompt": "sort b a", "source": "x"}\n{"prompt": "sort d c"}\n')
    assert main(given) == 0  # what the model sees is as before
    assert (tmp_path / "pairs" / "work" / "samples.jsonl").read_bytes() == sampled


def test_a_folder_of_something_else_is_refused(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*base, "--reward", FUNCTION]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "pairs").rglob("*") if path.is_file()}
    other = str(save_policy(tmp_path / "other", seed=2))
    for more, said in (
        (["--model", other], "holds candidates with model"),
        (["--limit", "2"], "holds candidates with prompts"),
        (["--samples", "4"], "holds candidates with seeds"),
        (["--temperature", "0.7"], "holds candidates with settings"),
        (["--reward", "math:log"], "holds scores with"),
    ):
        given = [word for word in base if word not in ("--model", base[1])] if "--model" in more else list(base)
        assert said in refused([*given, "--reward", FUNCTION, *more], capsys)
    assert {path: path.read_bytes() for path in (tmp_path / "pairs").rglob("*") if path.is_file()} == before


def test_a_folder_has_one_owner(base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_run, "LOCK_SECONDS", 0.0)
    (tmp_path / "pairs").mkdir()
    with (
        files.directory_lock(tmp_path / "pairs"),
        pytest.raises(ConfigError, match=r"--output .* is in use by process"),
    ):
        make_pairs(options(Path(base[1]), tmp_path / "pairs", "--reward", FUNCTION))


def test_prompts_that_the_model_has_no_room_for_are_counted(policy: Path, tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    texts = ["sort b a", "sort " + "a " * 120, "sort d c"]
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    given = options(policy, tmp_path / "pairs", "--samples", "4", "--reward", FUNCTION, "--prompts", str(source))
    make_pairs(given)
    counts = json.loads((tmp_path / "pairs" / "pairs.json").read_text())["counts"]
    assert counts["prompts_not_asked"] == {"longer than the model's positions": 1}
    source.write_text(json.dumps({"prompt": texts[1]}) + "\n")
    with pytest.raises(DataError, match="can answer none of the 1 prompts"):
        make_pairs(options(policy, tmp_path / "none", "--reward", FUNCTION, "--prompts", str(source)))


def test_prompts_of_several_messages_and_tools_stay_what_they_are(policy: Path, tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    messages = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c d"))]
    source.write_text(json.dumps({"prompt": messages}) + "\n" + json.dumps({"prompt": "sort b a"}) + "\n")
    for form in ("jsonl", "parquet"):
        more = ("--samples", "5", "--reward", FUNCTION, "--prompts", str(source), "--format", form)
        make_pairs(options(policy, tmp_path / "pairs", *more))
        config = DataConfig(cache_dir=str(tmp_path), max_length=128, max_prompt_length=32)
        data = load_preference_dataset(config, DatasetConfig(path=str(tmp_path / "pairs")), tiny_tokenizer())
        assert len(data) == 2
