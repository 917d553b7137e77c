"""The suites' data as `fetch` leaves it in a folder: questions, baseline answers, anchors, published numbers.

None of it is part of this project (AlpacaEval's data is CC BY-NC 4.0, Arena-Hard's Apache-2.0). Whatever form a file
has, what is read from it is compared with the hash of the published set.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_lmpo.errors import ConfigError, DataError
from nemo_lmpo.evaluate.suites import ALPACA_EVAL, ALPACA_EVAL_INSTRUCTIONS, ARENA_HARD, ARENA_HARD_QUESTIONS
from nemo_lmpo.runtime.files import content_hash, file_hash, read_lines, read_text, user_cache

ENVIRONMENT_VARIABLE = "NEMO_LMPO_EVAL_DATA"
BASELINES = {ALPACA_EVAL: "gpt4_1106_preview", ARENA_HARD: "gpt-4-0314"}
SET_HASHES = {
    # Of [dataset, instruction, baseline answer] each, in order.
    ALPACA_EVAL: "1a6244242ff96c4d17a07057f08bed16f987f435a6254ce0a9e2c0db4782189e",
    # Of [id, question] each, in order.
    ARENA_HARD: "6e8d3464343994d56a2a8aae1458674e7d316fd5233c183373fae3131a163bfd",
}
ARENA_BASELINE_HASH = "aff40fbcb493b3f5a8335777936978e3c84260ec43a54936ed5c9b97c21a8c46"
"""Of [id, answer] each, in the questions' order."""
DF_GAMED_HASH = "97aeec3f1c7de6dee6fd31fe66f1702623f4614c3efe1c6fc5f4927cd5fd674d"
"""Of the file with which AlpacaEval fits its length-controlled win rate."""
JUDGE_PROMPT_HASH = "04dedcde82430f6ce790bbac08c0c62c64a8d5cfd7613506489df29c252a2d46"
"""Of [system prompt, template] of Arena-Hard v0.1's released judge."""


class MissingFileError(DataError):
    """A data file was not fetched."""


@dataclass(frozen=True)
class Instruction:
    """One thing to answer."""

    id: str
    text: str
    baseline_answer: str


@dataclass(frozen=True)
class EvaluationSet:
    """What is answered and against whom; ``sha256`` tells sets apart."""

    suite: str
    instructions: list[Instruction]
    sha256: str
    baseline: str
    published: bool
    """Whether it is the published set."""


def data_folder(given: Path | None) -> Path:
    """The folder named, or by the environment, or in the user's cache."""
    if given is not None:
        if not given.is_dir():
            raise ConfigError(f"--data {given} is not a directory; make it with python -m nemo_lmpo.evaluate fetch")
        return given
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        return Path(named)
    return user_cache() / "evaluation"


def find_file(folder: Path, name: str, *others: str) -> Path:
    """A data file, packed or not.

    Raises:
        MissingFileError: it is not there.
    """
    for candidate in (name, *others):
        for path in (folder / candidate, folder / f"{candidate}.gz"):
            if path.is_file():
                return path
    raise MissingFileError(f"{folder} holds no {name}; run python -m nemo_lmpo.evaluate fetch --data {folder}")


def load_set(suite: str, folder: Path) -> EvaluationSet:
    """The published set of a suite.

    Raises:
        DataError: it is missing, or another one than the published set.
    """
    return _alpaca_eval(folder) if suite == ALPACA_EVAL else _arena_hard(folder)


def _alpaca_eval(folder: Path) -> EvaluationSet:
    path = find_file(folder, "alpaca_eval2_eval_set.json")
    rows = answers_of_file(path)
    found = content_hash([[row.get("dataset", ""), row["instruction"], row["output"]] for row in rows])
    _check(path, found, SET_HASHES[ALPACA_EVAL], len(rows), ALPACA_EVAL_INSTRUCTIONS)
    instructions = [Instruction(str(index), row["instruction"], row["output"]) for index, row in enumerate(rows)]
    return EvaluationSet(ALPACA_EVAL, instructions, found, BASELINES[ALPACA_EVAL], published=True)


def _arena_hard(folder: Path) -> EvaluationSet:
    path = find_file(folder, "arena_hard_v0.1_question.jsonl")
    rows = read_lines(path)
    try:
        questions = [arena_question(row) for row in rows]
    except (KeyError, IndexError, TypeError):
        raise DataError(f"{path} is not a list of Arena-Hard's questions; fetch it again") from None
    found = content_hash([[name, text] for name, text in questions])
    _check(path, found, SET_HASHES[ARENA_HARD], len(rows), ARENA_HARD_QUESTIONS)
    path = find_file(folder, f"arena_hard_v0.1_{BASELINES[ARENA_HARD]}.jsonl")
    answers = arena_answers(path)
    baseline = [[name, answers.get(name, "")] for name, _ in questions]
    _check(path, content_hash(baseline), ARENA_BASELINE_HASH, len(answers), ARENA_HARD_QUESTIONS)
    instructions = [Instruction(name, text, answers[name]) for name, text in questions]
    return EvaluationSet(ARENA_HARD, instructions, found, BASELINES[ARENA_HARD], published=True)


def load_own_questions(path: Path) -> EvaluationSet:
    """Questions of the user's own, in Arena-Hard's manner: JSON Lines with `id`, `question` and `baseline_answer`.

    Raises:
        DataError: a line lacks one of them, or two have one id; names it.
    """
    instructions: dict[str, Instruction] = {}
    for number, row in enumerate(read_lines(path), 1):
        texts = [row.get(name) for name in ("id", "question", "baseline_answer")]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(f"{path}, line {number} needs texts in `id`, `question` and `baseline_answer`")
        if row["id"] in instructions:
            raise DataError(f"{path}, line {number}: the id {row['id']} was there before; give each its own")
        instructions[row["id"]] = Instruction(row["id"], row["question"], row["baseline_answer"])
    if not instructions:
        raise DataError(f"{path} holds no questions")
    every = list(instructions.values())
    digest = content_hash([[one.id, one.text, one.baseline_answer] for one in every])
    return EvaluationSet(ARENA_HARD, every, digest, path.stem, published=False)


def _check(path: Path, found: str, expected: str, count: int, expected_count: int) -> None:
    if found != expected:
        raise DataError(
            f"{path} holds {count} entries with hash {found[:12]}, not the published {expected_count} with hash "
            f"{expected[:12]}; fetch it again"
        )


def arena_question(row: Mapping[str, Any]) -> tuple[str, str]:
    """Id and text of a question in the form of 2024 (`question_id`, `turns`) or of 2025 (`uid`, `prompt`)."""
    if "uid" in row:
        return str(row["uid"]), str(row["prompt"])
    return str(row["question_id"]), str(row["turns"][0]["content"])


def arena_answers(path: Path) -> dict[str, str]:
    """Answers by question id from a file of either form.

    Raises:
        DataError: a line has neither form; names it.
    """
    answers = {}
    for number, row in enumerate(read_lines(path), 1):
        try:
            if "uid" in row:
                answers[str(row["uid"])] = str(row["messages"][-1]["content"]["answer"])
            else:
                answers[str(row["question_id"])] = str(row["choices"][0]["turns"][0]["content"])
        except (KeyError, IndexError, TypeError):
            raise DataError(f"{path}, line {number} is not an answer in the form of Arena-Hard") from None
    return answers


def answers_of_file(path: Path) -> list[dict[str, Any]]:
    """Rows of a file in AlpacaEval's form: a JSON list with `instruction` and `output`.

    Raises:
        DataError: another form.
    """
    try:
        rows = json.loads(read_text(path))
        json.dumps(rows, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(f"{path} holds half a surrogate pair, which is not a character; remove it") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); fetch or write it again") from None
    fine = isinstance(rows, list) and all(
        isinstance(row, dict) and isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str)
        for row in rows
    )
    if not fine:
        raise DataError(
            f"{path} is not a list of objects with `instruction` and `output`, which AlpacaEval's answers are"
        )
    return list(rows)


@dataclass(frozen=True)
class JudgePrompt:
    """The prompt of Arena-Hard's judge."""

    system: str
    template: str
    """With {QUESTION}, {ANSWER_A} and {ANSWER_B}."""

    @property
    def sha256(self) -> str:
        """Identifies it."""
        return content_hash([self.system, self.template])

    @property
    def published(self) -> bool:
        """Whether it is the released one."""
        return self.sha256 == JUDGE_PROMPT_HASH

    def messages(self, question: str, answer_a: str, answer_b: str) -> list[dict[str, str]]:
        """The conversation to send."""
        # Not str.format: answers hold braces.
        parts = {"{QUESTION}": question, "{ANSWER_A}": answer_a, "{ANSWER_B}": answer_b}
        told = re.sub("|".join(map(re.escape, parts)), lambda place: parts[place[0]], self.template)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": told}]


def load_judge_prompt(folder: Path, given: Path | None) -> JudgePrompt:
    """Arena-Hard's judge prompt as fetched, or from a JSON file with `system` and `template`.

    Raises:
        DataError: it is missing, or without its three places.
    """
    path = given or find_file(folder, "arena_hard_v0.1_judge.json")
    try:
        content = json.loads(read_text(path))
        prompt = JudgePrompt(content["system"], content["template"])
        fine = all(prompt.template.count(name) == 1 for name in ("{QUESTION}", "{ANSWER_A}", "{ANSWER_B}"))
    except (ValueError, KeyError, TypeError, AttributeError):
        fine = False
    if not fine:
        raise DataError(
            f"{path} is not a judge prompt: a JSON object with `system` and `template`, which has {{QUESTION}}, "
            "{ANSWER_A} and {ANSWER_B} once each"
        )
    if given is None and not prompt.published:
        raise DataError(f"{path} is another prompt than Arena-Hard v0.1's; fetch it again, or name it --judge-prompt")
    return prompt


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file by column."""
    return list(csv.DictReader(io.StringIO(read_text(path))))


def published_scores(suite: str, folder: Path, name: str) -> dict[str, float]:
    """What the suite's own leaderboard, judged by gpt-4-1106-preview, says of a model; empty if it is not there."""
    if suite == ALPACA_EVAL:
        rows = {row[""]: row for row in read_table(find_file(folder, "alpaca_eval2_leaderboard.csv"))}
        columns = {"lc": "length_controlled_winrate", "wr": "win_rate", "length": "avg_length"}
    else:
        rows = {row["model"]: row for row in read_table(find_file(folder, "arena_hard_v0.1_leaderboard_20240731.csv"))}
        columns = {"wr": "score", "length": "avg_tokens"}
    if name not in rows:
        return {}
    return {key: float(rows[name][column]) for key, column in columns.items()}


def df_gamed_file(folder: Path, into: Path) -> Path:
    """AlpacaEval's `df_gamed.csv` as a plain file: the published one, or a substitute with the same sums.

    Raises:
        DataError: neither is there, or the published one is damaged.
    """
    path = find_file(folder, "alpaca_eval2_df_gamed.csv", "alpaca_eval2_df_gamed_substitute.csv")
    if path.suffix == ".gz":
        plain = into / path.stem
        plain.write_bytes(gzip.decompress(path.read_bytes()))
        path = plain
    if "substitute" not in path.name and file_hash(path) != DF_GAMED_HASH:
        raise DataError(f"{path} is damaged, its hash is not the published {DF_GAMED_HASH[:12]}; fetch it again")
    return path.absolute()
