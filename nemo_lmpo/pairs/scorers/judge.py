"""Scores by a judge over HTTP: a grade for each answer, or games of all pairs in both orders."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

from nemo_lmpo.answers.journal import Journal
from nemo_lmpo.answers.judge import JudgeServer
from nemo_lmpo.answers.replies import ChatReply
from nemo_lmpo.answers.workers import ItemError, for_each
from nemo_lmpo.errors import UserError
from nemo_lmpo.pairs.candidate import AskedPrompt, Candidate
from nemo_lmpo.pairs.score import NO_VERDICT, REFUSED, Keep, Missing, with_missing
from nemo_lmpo.pairs.scorers.judge_prompts import POINTWISE, JudgePrompt, games_won, grade, verdict

_Call = tuple[str, AskedPrompt, tuple[str, ...]]
"""A key of the journal, and what is asked: a prompt with one answer or two."""


@dataclass(frozen=True)
class JudgeScorer:
    """Asks a judge; each of its replies is in a journal of its own, so none is paid for twice."""

    server: JudgeServer
    prompt: JudgePrompt
    calls: Path

    def identity(self) -> Mapping[str, Any]:
        """Who judges, and what it is asked."""
        return {
            "judge": self.server.name,
            "mode": self.prompt.mode,
            "judge prompt": self.prompt.sha256,
            **({"judge extra": dict(self.server.extra)} if self.server.extra else {}),
        }

    def score(self, prompts: Missing, missing: set[str], keep: Keep) -> None:
        """Several requests at a time; a prompt's scores are kept when all of its calls are there.

        Raises:
            UserError: the judge cannot be asked; what it said is kept.
        """
        wanted = with_missing(prompts, missing)
        with Journal(self.calls, "call") as journal:
            calls = [call for prompt, them in wanted for call in self._calls(prompt, them)]
            waiting = [call for call in calls if call[0] not in journal.rows]
            error: UserError | None = None
            try:
                for_each(waiting, lambda call, stop: self._ask(call, stop, journal), self._concurrency)
            except UserError as caught:
                error = caught
            for prompt, them in wanted:
                if all(key in journal.rows for key, *_ in self._calls(prompt, them)):
                    self._keep(them, journal.rows, keep)
            if error is not None:
                raise error

    @property
    def _concurrency(self) -> int:
        return self.server.endpoint.limits.concurrency

    def _calls(self, prompt: AskedPrompt, candidates: Sequence[Candidate]) -> list[_Call]:
        if self.prompt.mode == POINTWISE:
            return [(one.name, prompt, (one.text,)) for one in candidates]
        pairs = permutations(candidates, 2)
        return [(_game(one.name, other.name), prompt, (one.text, other.text)) for one, other in pairs]

    def _ask(self, call: _Call, stop: threading.Event, journal: Journal) -> None:
        key, prompt, answers = call
        try:
            reply = self.server.ask(self.prompt.request(self.server.name, prompt, *answers), stop).reply
            found = self._found(reply)
        except ItemError as error:
            raise ItemError(f"judgment {key}: {error}") from None
        journal.append({"call": key, "found": found, "refused": reply.refusal, "model": reply.model})

    def _found(self, reply: ChatReply) -> float | str | None:
        if reply.refusal:
            return None
        if self.prompt.mode != POINTWISE:
            return verdict(reply)
        if not reply.top_tokens:
            raise ItemError(
                "the judge returns no top_logprobs, of which grades are made; choose a judge or server that does "
                "(vLLM does), or --judge-mode pairwise"
            )
        return grade(reply)

    def _keep(self, candidates: Sequence[Candidate], rows: Mapping[str, Mapping[str, Any]], keep: Keep) -> None:
        if self.prompt.mode == POINTWISE:
            found = {one.name: rows[one.name]["found"] for one in candidates}
        else:
            names = [one.name for one in candidates]
            found = games_won({pair: rows[_game(*pair)]["found"] for pair in permutations(names, 2)})
        refused = {name for name in found for key, row in _about(name, rows, candidates) if row["refused"]}
        keep({name: score for name, score in found.items() if name not in refused}, NO_VERDICT)
        keep({name: score for name, score in found.items() if name in refused}, REFUSED)


def _game(first: str, second: str) -> str:
    """The key of a game: the prompt's id stands in it once."""
    prompt, _, sample = second.rpartition("/")
    return f"{first}>{sample}" if first.startswith(f"{prompt}/") else f"{first}>{second}"


def _about(
    name: str, rows: Mapping[str, Mapping[str, Any]], candidates: Sequence[Candidate]
) -> list[tuple[str, Mapping[str, Any]]]:
    """The calls in which a candidate was judged."""
    others = [one.name for one in candidates if one.name != name]
    keys = [name, *(_game(name, other) for other in others), *(_game(other, name) for other in others)]
    return [(key, rows[key]) for key in keys if key in rows]
