"""The suites' data: only the published sets are taken for them, whatever form the files have."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from nemo_lmpo.errors import ConfigError, DataError
from nemo_lmpo.evaluate import fetch
from nemo_lmpo.evaluate.answers import stored_answers
from nemo_lmpo.evaluate.data_files import (
    EvaluationSet,
    Instruction,
    answers_of_file,
    arena_answers,
    data_folder,
    load_judge_prompt,
    load_own_questions,
    load_set,
    published_scores,
)
from nemo_lmpo.evaluate.suites import ALPACA_EVAL, ARENA_HARD
from nemo_lmpo.runtime.files import read_lines, read_text


@pytest.fixture
def data(shared_dir: Path) -> Path:
    folder = shared_dir / "evaluation"
    if not (folder / "alpaca_eval2_eval_set.json.gz").exists():
        pytest.skip("the folder `shared` has no evaluation data")
    return folder


def test_published_sets(data: Path) -> None:
    assert len(load_set(ALPACA_EVAL, data).instructions) == 805
    arena = load_set(ARENA_HARD, data)
    assert len(arena.instructions) == 500
    assert arena.baseline == "gpt-4-0314"
    assert published_scores(ALPACA_EVAL, data, "Mistral-7B-Instruct-v0.2")["lc"] == pytest.approx(17.11, abs=0.01)
    assert published_scores(ARENA_HARD, data, "gpt-3.5-turbo-0125") == {"wr": 23.34, "length": 329.0}
    assert published_scores(ARENA_HARD, data, "nobody") == {}


def test_questions_of_2025_are_the_same_set(data: Path, tmp_path: Path) -> None:
    for name, ours in (("question", "questions"), ("gpt-4-0314", "answers")):
        rows = read_lines(data / f"arena_hard_v0.1_{name}.jsonl.gz")
        if ours == "questions":
            rows = [{"uid": row["question_id"], "prompt": row["turns"][0]["content"]} for row in rows]
        else:
            rows = [
                {
                    "uid": row["question_id"],
                    "messages": [{"role": "user"}, {"content": {"answer": row["choices"][0]["turns"][0]["content"]}}],
                }
                for row in rows
            ]
        (tmp_path / f"arena_hard_v0.1_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_set(ARENA_HARD, tmp_path).sha256 == load_set(ARENA_HARD, data).sha256


def test_another_set_is_refused(data: Path, tmp_path: Path) -> None:
    rows = json.loads(read_text(data / "alpaca_eval2_eval_set.json.gz"))
    path = tmp_path / "alpaca_eval2_eval_set.json"
    path.write_text(json.dumps(rows[:-1]))
    with pytest.raises(DataError, match=r"804 entries with hash .* not the published 805"):
        load_set(ALPACA_EVAL, tmp_path)
    rows[7]["output"] += " "
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match="not the published 805"):
        load_set(ALPACA_EVAL, tmp_path)


def test_half_a_file_is_refused(data: Path, tmp_path: Path) -> None:
    content = (data / "alpaca_eval2_eval_set.json.gz").read_bytes()
    (tmp_path / "alpaca_eval2_eval_set.json.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        load_set(ALPACA_EVAL, tmp_path)


def test_missing_data_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"evaluate fetch --data {tmp_path}"):
        load_set(ARENA_HARD, tmp_path)
    with pytest.raises(ConfigError, match=r"--data .*gone is not a directory"):
        data_folder(tmp_path / "gone")


def small_set(suite: str) -> EvaluationSet:
    return EvaluationSet(
        suite, [Instruction(str(index), f"ask {index}", "base") for index in range(3)], "0", "b", False
    )


def test_answers_must_be_complete(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    path.write_text(json.dumps([{"instruction": f"ask {index}", "output": "yes"} for index in range(2)]))
    with pytest.raises(DataError, match="answers 2 of the 3 instructions"):
        stored_answers(path, small_set(ALPACA_EVAL))
    path.write_text(json.dumps([{"instruction": "ask 0"}]))
    with pytest.raises(DataError, match="`instruction` and `output`"):
        stored_answers(path, small_set(ALPACA_EVAL))
    path.write_text('{"uid": "0", "messages": []}\n')
    with pytest.raises(DataError, match="line 1 is not an answer in the form of Arena-Hard"):
        arena_answers(path)


@pytest.mark.parametrize(
    "content", ['{"system": "s", "template": "{QUESTION} {ANSWER_A}"}', "[]", "x", '{"system": "s"}']
)
def test_judge_prompts_need_their_places(tmp_path: Path, content: str) -> None:
    path = tmp_path / "prompt.json"
    path.write_text(content)
    with pytest.raises(DataError, match="is not a judge prompt"):
        load_judge_prompt(tmp_path, path)


def test_only_the_released_judge_prompt_is_taken_for_it(tmp_path: Path) -> None:
    path = tmp_path / "arena_hard_v0.1_judge.json"
    path.write_text('{"system": "s", "template": "{QUESTION} {ANSWER_A} {ANSWER_B}"}')
    with pytest.raises(DataError, match=r"another prompt than Arena-Hard v0.1's"):
        load_judge_prompt(tmp_path, None)
    assert not load_judge_prompt(tmp_path, path).published


def test_fetch_takes_right_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"http://host/a": b"one", "http://host/b": b"two", "http://host/code": b'P = "judge"\n'}
    texts["http://host/config"] = yaml.safe_dump({"prompt_template": "{QUESTION}{ANSWER_A}{ANSWER_B}"}).encode()
    digests = {url: hashlib.sha256(text).hexdigest() for url, text in texts.items()}
    monkeypatch.setattr(fetch, "SOURCES", [fetch.RemoteFile(url[-1], url, digests[url]) for url in list(texts)[:2]])
    monkeypatch.setattr(fetch, "_JUDGE_PROMPT", fetch.RemoteFile("", "http://host/code", digests["http://host/code"]))
    monkeypatch.setattr(
        fetch, "_JUDGE_CONFIG", fetch.RemoteFile("", "http://host/config", digests["http://host/config"])
    )
    asked: list[str] = []

    def download(url: str) -> bytes:
        asked.append(url)
        return texts[url]

    texts["http://host/b"] = b"tw"
    with pytest.raises(DataError, match=r"http://host/b has hash .*changed or cut off"):
        fetch.fetch_files(tmp_path, download, quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    texts["http://host/b"] = b"two"
    # The prompt is the released one or none.
    with pytest.raises(DataError, match="no judge prompt of Arena-Hard"):
        fetch.fetch_files(tmp_path, download, quiet=True)
    assert asked.count("http://host/a") == 1


def test_sources_are_what_the_suites_read() -> None:
    names = {source.name for source in fetch.SOURCES}
    assert {"alpaca_eval2_eval_set.json", "alpaca_eval2_df_gamed.csv", "arena_hard_v0.1_question.jsonl"} <= names
    assert all(source.url.startswith("https://") for source in fetch.SOURCES)
    assert all(len(source.sha256 or "") == 64 for source in fetch.SOURCES)


def test_own_questions(tmp_path: Path) -> None:
    path = tmp_path / "sorting.jsonl"
    rows = [{"id": str(index), "question": f"sort {index}", "baseline_answer": "a b"} for index in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_own_questions(path)
    assert (len(found.instructions), found.published, found.baseline) == (3, False, "sorting")
    path.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[0]) + "\n")
    with pytest.raises(DataError, match="line 2: the id 0 was there before"):
        load_own_questions(path)
    path.write_text(json.dumps({**rows[0], "baseline_answer": " "}) + "\n")
    with pytest.raises(DataError, match="line 1 needs texts in `id`, `question` and `baseline_answer`"):
        load_own_questions(path)


def test_half_surrogates_are_refused_where_they_are_read(tmp_path: Path) -> None:
    """Tokenizers and files cannot hold them, so they would end an evaluation later."""
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.json"
    questions.write_text('{"id": "0", "question": "a", "baseline_answer": "b"}\n{"id": "\\ud800"}\n')
    with pytest.raises(DataError, match=r"questions.jsonl, line 2 holds half a surrogate pair"):
        load_own_questions(questions)
    answers.write_text('[{"instruction": "a", "output": "\\udc00"}]')
    with pytest.raises(DataError, match=r"answers.json holds half a surrogate pair"):
        answers_of_file(answers)


@pytest.mark.parametrize("content", ["[" * 100_000, "{"])
def test_what_is_not_json_is_refused_in_a_sentence(content: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(content)
    for read in (load_own_questions, answers_of_file):
        with pytest.raises(DataError, match="is not JSON"):
            read(path)
