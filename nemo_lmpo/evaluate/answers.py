"""The first stage: a model's answers to a set, from a server, in process, or from a file that has them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from nemo_lmpo.answers.answer import Answer
from nemo_lmpo.answers.completions import CompletionRequests, PromptCountError, complete, refused_parameters
from nemo_lmpo.answers.endpoint import Endpoint, RefusedError
from nemo_lmpo.answers.journal import Journal
from nemo_lmpo.answers.workers import ItemError, for_each
from nemo_lmpo.errors import ConfigError, DataError
from nemo_lmpo.evaluate.data_files import EvaluationSet, Instruction, answers_of_file, arena_answers
from nemo_lmpo.evaluate.suites import ALPACA_EVAL, GenerationSettings
from nemo_lmpo.runtime.files import file_hash

ANSWERS_FILE = "answers.jsonl"
_MOST_EMPTY = 0.01
Progress = Callable[[int], object]
"""Called with how many more are done."""


def row_of(name: str, answer: Answer) -> dict[str, Any]:
    """A line of `answers.jsonl`: the answer to the instruction ``name``."""
    return {"id": name, "output": answer.text, "tokens": answer.tokens, "truncated": not answer.finished}


def answer_of(row: Mapping[str, Any]) -> Answer:
    """The answer in a line of `answers.jsonl`."""
    return Answer(row["output"], finished=not row.get("truncated"), count=row.get("tokens"))


class AnswerSource(Protocol):
    """Who answers."""

    def generation(self) -> Mapping[str, Any]:
        """What decides the answers besides the model: settings, seed, backend, dtype, versions."""

    def answer(self, instructions: Sequence[Instruction], keep: Journal, progress: Progress) -> None:
        """Answer each and append it to the journal as it comes."""


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
                source.answer(missing, journal, bar.update)
        rows = {instruction.id: journal.rows[instruction.id] for instruction in chosen}
    empty = [name for name, row in rows.items() if not row["output"].strip()]
    if len(empty) > _MOST_EMPTY * len(rows) and not allow_empty:
        raise DataError(
            f"{folder / ANSWERS_FILE}: {len(empty)} of {len(rows)} answers are empty (the first to instruction "
            f"{empty[0]}); look at the prompts and the template, or say --allow-empty if the model does that"
        )
    return {name: answer_of(row) for name, row in rows.items()}


@dataclass(frozen=True)
class EndpointSource:
    """A server that completes token ids."""

    endpoint: Endpoint
    prompts: Mapping[str, list[int]]
    """Token ids by instruction."""
    requests: CompletionRequests
    settings: GenerationSettings
    max_positions: int
    left_out: list[str] = field(default_factory=list)
    """Parameters that the server refuses, once it was asked."""

    def generation(self) -> Mapping[str, Any]:
        """Its settings; which versions the server runs, it does not say."""
        return {
            **asdict(self.settings),
            "seed": self.requests.sampling.seed,
            "stop_token_ids": list(self.requests.stop_ids),
            "backend": "endpoint",
            "served_name": self.requests.model,
            "endpoint": self.endpoint.shown,
            "dtype": "the server's",
            **({"left to the server": self.left_out} if self.left_out else {}),
        }

    def answer(self, instructions: Sequence[Instruction], keep: Journal, progress: Progress) -> None:
        """Ask for one answer per request, several at a time; the first alone, to see what the server can do."""
        bodies = {one.id: self._body(one.id) for one in instructions}

        def keep_one(name: str, stop: threading.Event) -> None:
            body = {key: value for key, value in bodies[name].items() if key not in self.left_out}
            found = complete(self.endpoint, body, stop)
            finished = found.finish_reason != "length"
            keep.append(row_of(name, Answer(found.text.strip(), finished=finished, count=found.completion_tokens)))
            progress(1)

        first, *others = bodies
        try:
            keep_one(first, threading.Event())
        except PromptCountError as error:
            raise DataError(str(error)) from None  # it does so with all of them
        except ItemError as error:
            if isinstance(error, RefusedError) and error.status in (400, 422):
                self.left_out.extend(refused_parameters(self.endpoint, bodies[first], error))
            others.insert(0, first)

        def work(name: str, stop: threading.Event) -> None:
            try:
                keep_one(name, stop)
            except ItemError as error:
                raise ItemError(f"instruction {name}: {error}") from None

        for_each(others, work, self.endpoint.limits.concurrency)

    def _body(self, name: str) -> dict[str, Any]:
        prompt = self.prompts[name]
        wanted = self.settings.max_new_tokens
        return self.requests.body(name, prompt, room(wanted, len(prompt), self.max_positions, name))


def room(wanted: int, prompt: int, positions: int, name: str) -> int:
    """How many new tokens there is room for.

    Raises:
        DataError: none.
    """
    left = positions - prompt
    if left < 1:
        raise DataError(
            f"the prompt of instruction {name} has {prompt} tokens, and the model {positions} positions: nothing can "
            "be answered; this model cannot take the whole set"
        )
    return min(wanted, left)


@dataclass(frozen=True)
class StoredSource:
    """Answers that exist already."""

    outputs: Mapping[str, str]
    """By instruction."""
    sha256: str

    def generation(self) -> Mapping[str, Any]:
        """Unknown but for the file."""
        return {"backend": "stored answers", "sha256": self.sha256}

    def answer(self, instructions: Sequence[Instruction], keep: Journal, progress: Progress) -> None:
        """Copy them."""
        keep.extend(row_of(one.id, Answer(self.outputs[one.id])) for one in instructions)
        progress(len(instructions))


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
