"""The first stage: a model's answers to a set, from a server, in process, or from a file that has them."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from nemo_lmpo.answers.endpoint import Endpoint, for_each
from nemo_lmpo.answers.journal import Journal
from nemo_lmpo.errors import ConfigError, DataError
from nemo_lmpo.evaluate.data_files import EvaluationSet, Instruction, answers_of_file, arena_answers
from nemo_lmpo.evaluate.suites import ALPACA_EVAL, GenerationSettings
from nemo_lmpo.runtime.files import file_hash

ANSWERS_FILE = "answers.jsonl"
_MOST_EMPTY = 0.01
Progress = Callable[[int], object]
"""Is told how many more are done."""


@dataclass(frozen=True)
class Answer:
    """What was answered to one instruction."""

    id: str
    output: str
    tokens: int | None = None
    """The token that ended it included, where that is known."""
    truncated: bool = False
    """Whether the limit of tokens ended it, not the model."""


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
    return {
        name: Answer(name, row["output"], row.get("tokens"), bool(row.get("truncated"))) for name, row in rows.items()
    }


@dataclass(frozen=True)
class EndpointSource:
    """A server that completes token ids."""

    endpoint: Endpoint
    served_name: str
    prompts: Mapping[str, list[int]]
    """Token ids by instruction."""
    stop_ids: Sequence[int]
    settings: GenerationSettings
    seed: int
    most_positions: int

    def generation(self) -> Mapping[str, Any]:
        """Its settings; which versions the server runs, it does not say."""
        return {
            **asdict(self.settings),
            "seed": self.seed,
            "stop_token_ids": list(self.stop_ids),
            "backend": "endpoint",
            "served_name": self.served_name,
            "endpoint": self.endpoint.shown,
            "dtype": "the server's",
        }

    def answer(self, instructions: Sequence[Instruction], keep: Journal, progress: Progress) -> None:
        """Ask for one answer a request, several at a time."""

        def one(instruction: Instruction) -> None:
            keep.append(asdict(self._ask(instruction)))
            progress(1)

        for_each(instructions, one, self.endpoint.limits.concurrency)

    def _ask(self, instruction: Instruction) -> Answer:
        prompt = self.prompts[instruction.id]
        body = {
            "model": self.served_name,
            "prompt": prompt,
            "max_tokens": room(self.settings.max_new_tokens, len(prompt), self.most_positions, instruction.id),
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            # A seed of its own, so that an answer does not depend on which were asked before it.
            "seed": (self.seed + zlib.crc32(instruction.id.encode())) % 2**31,
            "stop_token_ids": list(self.stop_ids),
            "skip_special_tokens": True,
        }
        response = self.endpoint.post("completions", body)
        try:
            choice = response["choices"][0]
            text, reason = str(choice["text"]), choice.get("finish_reason")
        except (KeyError, IndexError, TypeError):
            raise DataError(
                f"{self.endpoint.option} {self.endpoint.shown} answers without choices[0].text; it must serve "
                "/v1/completions for token ids, as `vllm serve` does"
            ) from None
        usage = response.get("usage") or {}
        counted = usage.get("prompt_tokens")
        if counted is not None and counted != len(prompt):
            raise DataError(
                f"{self.endpoint.option} {self.endpoint.shown} counts {counted} tokens in the prompt of instruction "
                f"{instruction.id}, of which {len(prompt)} were sent: it adds its own (a second BOS?); use a server "
                "that takes token ids as they are"
            )
        return Answer(instruction.id, text.strip(), usage.get("completion_tokens"), reason == "length")


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
        keep.extend(asdict(Answer(one.id, self.outputs[one.id])) for one in instructions)
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
