"""The first stage: a model's answers to a set, from a server, in process, or from a file that has them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nemo_lmpo.answers.answer import Answer
from nemo_lmpo.answers.journal import Journal
from nemo_lmpo.answers.sources import AnswerSource, Progress, answer_of, row_of
from nemo_lmpo.errors import ConfigError, DataError
from nemo_lmpo.evaluate.data_files import EvaluationSet, Instruction, answers_of_file, arena_answers
from nemo_lmpo.evaluate.suites import ALPACA_EVAL
from nemo_lmpo.runtime.files import file_hash

ANSWERS_FILE = "answers.jsonl"
_MOST_EMPTY = 0.01


def choose(instructions: Sequence[Instruction], limit: int | None) -> list[Instruction]:
    """The first ``limit`` of a fixed shuffle, in the set's order; a larger limit has all of a smaller one.

    Raises:
        ConfigError: a limit below 1.
    """
    if limit is None or limit >= len(instructions):
        return list(instructions)
    if limit < 1:
        raise ConfigError(f"--limit {limit} must be at least 1; leave it out for all {len(instructions)}")
    order = list(range(len(instructions)))
    random.Random(123).shuffle(order)
    return [instructions[index] for index in sorted(order[:limit])]


def collect_answers(
    chosen: Sequence[Instruction], folder: Path, source: AnswerSource, *, allow_empty: bool, quiet: bool
) -> dict[str, Answer]:
    """Answers by id, in the order of the instructions; those of an earlier run are taken as they are.

    Raises:
        UserError: the source cannot answer; what it answered is kept.
        DataError: more than 1 % of the answers are empty.
    """
    with Journal(folder / ANSWERS_FILE, "id") as journal:
        missing = [instruction for instruction in chosen if instruction.id not in journal.rows]
        done, hidden = len(chosen) - len(missing), True if quiet else None
        with tqdm(total=len(chosen), initial=done, desc="generate", unit="answer", disable=hidden) as bar:
            if missing:
                source.answer([one.id for one in missing], journal, bar.update)
        rows = {instruction.id: journal.rows[instruction.id] for instruction in chosen}
    empty = [name for name, row in rows.items() if not row["output"].strip()]
    if len(empty) > _MOST_EMPTY * len(rows) and not allow_empty:
        raise DataError(
            f"{folder / ANSWERS_FILE}: {len(empty)} of {len(rows)} answers are empty (the first to instruction "
            f"{empty[0]}); look at the prompts and the template, or say --allow-empty if the model does that"
        )
    return {name: answer_of(row) for name, row in rows.items()}


@dataclass(frozen=True)
class StoredSource:
    """Answers that exist already."""

    outputs: Mapping[str, str]
    """By instruction."""
    sha256: str

    def generation(self) -> Mapping[str, Any]:
        """Unknown but for the file."""
        return {"backend": "stored answers", "sha256": self.sha256}

    def answer(self, names: Sequence[str], keep: Journal, progress: Progress) -> None:
        """Copy them."""
        keep.extend(row_of(name, Answer(self.outputs[name])) for name in names)
        progress(len(names))


def stored_answers(path: Path, evaluation_set: EvaluationSet) -> StoredSource:
    """Answers from a file in the suite's own form.

    Raises:
        DataError: it has another form, or leaves instructions out.
    """
    if evaluation_set.suite == ALPACA_EVAL:
        by_text = {row["instruction"]: row["output"] for row in answers_of_file(path)}
        outputs = {one.id: by_text[one.text] for one in evaluation_set.instructions if one.text in by_text}
    else:
        found = arena_answers(path)
        outputs = {one.id: found[one.id] for one in evaluation_set.instructions if one.id in found}
    count = len(evaluation_set.instructions)
    if len(outputs) < count:
        raise DataError(
            f"{path} answers {len(outputs)} of the {count} instructions; the numbers need all of them, so complete it"
        )
    return StoredSource(outputs, file_hash(path))
