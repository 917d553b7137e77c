"""Who answers prompts: what every source of answers has in common, and a server that completes token ids."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nemo_lmpo.answers.answer import Answer
from nemo_lmpo.answers.completions import CompletionRequests, PromptCountError, complete, refused_parameters
from nemo_lmpo.answers.endpoint import Endpoint, RefusedError
from nemo_lmpo.answers.journal import Journal
from nemo_lmpo.answers.sampling import DEFAULT_NEW_TOKENS, Sampling
from nemo_lmpo.answers.workers import ItemError, for_each
from nemo_lmpo.errors import DataError

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

    def answer(self, names: Sequence[str], keep: Journal, progress: Progress) -> None:
        """Answer each of these prompts and append it to the journal as it comes."""


@dataclass(frozen=True)
class EndpointSource:
    """A server that completes token ids."""

    endpoint: Endpoint
    prompts: Mapping[str, list[int]]
    """Token ids by name."""
    requests: CompletionRequests
    max_positions: int
    noun: str = "instruction"
    """What messages call a prompt."""
    left_out: list[str] = field(default_factory=list)
    """Parameters that the server refuses, once it was asked."""

    def generation(self) -> Mapping[str, Any]:
        """Its settings; which versions the server runs, it does not say."""
        return {
            **decisive(self.requests.sampling),
            "stop_token_ids": list(self.requests.stop_ids),
            "backend": "endpoint",
            "served_name": self.requests.model,
            "endpoint": self.endpoint.shown,
            "dtype": "the server's",
            **({"left to the server": self.left_out} if self.left_out else {}),
        }

    def answer(self, names: Sequence[str], keep: Journal, progress: Progress) -> None:
        """Ask for one answer per request, several at a time; the first alone, to see what the server can do."""
        bodies = {name: self._body(name) for name in names}

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
                raise ItemError(f"{self.noun} {name}: {error}") from None

        for_each(others, work, self.endpoint.limits.concurrency)

    def _body(self, name: str) -> dict[str, Any]:
        prompt = self.prompts[name]
        wanted = self.requests.sampling.max_new_tokens or DEFAULT_NEW_TOKENS
        return self.requests.body(name, prompt, room(wanted, len(prompt), self.max_positions, f"{self.noun} {name}"))


def decisive(sampling: Sampling) -> dict[str, Any]:
    """What of a way of sampling decides an answer by itself."""
    found = {
        "temperature": sampling.temperature,
        "max_new_tokens": sampling.max_new_tokens,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
    }
    return {**found, "top_k": sampling.top_k} if sampling.top_k else found


def room(wanted: int, prompt: int, positions: int, what: str) -> int:
    """How many new tokens there is room for.

    Args:
        wanted: at most so many.
        prompt: tokens of the prompt.
        positions: of the model.
        what: the prompt is called in the message.

    Raises:
        DataError: none.
    """
    left = positions - prompt
    if left < 1:
        raise DataError(
            f"the prompt of {what} has {prompt} tokens, and the model {positions} positions: nothing can "
            "be answered; this model cannot take the whole set"
        )
    return min(wanted, left)
