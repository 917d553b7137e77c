"""Scores by a reward model behind a server, as vLLM serves them: `/pooling`, `/classify` or `/score`."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_lmpo.answers.endpoint import Endpoint
from nemo_lmpo.answers.replies import parse_score
from nemo_lmpo.answers.workers import ItemError, for_each
from nemo_lmpo.data.tokenizer import tokenizer_fingerprint
from nemo_lmpo.pairs.candidate import AskedPrompt, Candidate
from nemo_lmpo.pairs.score import Keep, Missing
from nemo_lmpo.pairs.scorers.conversation import RewardRendering, conversation, prompt_text
from nemo_lmpo.runtime.files import content_hash


@dataclass(frozen=True)
class ServerScorer:
    """Asks for one score per request."""

    endpoint: Endpoint
    name: str
    """The model's name there."""
    path: str
    """`pooling`, `classify` or `score`."""
    rendering: RewardRendering | None
    """Makes token ids here; None: the server renders messages with its own template."""

    def identity(self) -> Mapping[str, Any]:
        """What is asked for; which versions the server runs, it does not say."""
        found: dict[str, Any] = {"reward model": self.name, "path": self.path}
        if self.rendering is not None:
            found["template"] = content_hash(self.rendering.template)
            found["tokenizer"] = tokenizer_fingerprint(self.rendering.tokenizer)
        return found

    def score(self, prompts: Missing, missing: set[str], keep: Keep) -> None:
        """Several requests at a time.

        Raises:
            UserError: the server does not answer, or not with a score.
        """
        wanted = [
            (prompt, kept)
            for prompt, candidates in prompts
            if (kept := [one for one in candidates if one.name in missing])
        ]
        if self.rendering is not None and self.path != "score":
            ids = self.rendering.all_ids(wanted, keep)
            bodies = {name: {"input": one} for name, one in ids.items()}
        else:
            bodies = {one.name: self._text(prompt, one) for prompt, them in wanted for one in them}

        def work(name: str, stop: threading.Event) -> None:
            try:
                body = {"model": self.name, **bodies[name]}
                keep({name: self.endpoint.post(f"/{self.path}", body, parse_score, stop=stop)})
            except ItemError as error:
                raise ItemError(f"answer {name}: {error}") from None

        for_each(list(bodies), work, self.endpoint.limits.concurrency)

    def _text(self, prompt: AskedPrompt, candidate: Candidate) -> dict[str, Any]:
        if self.path == "score":
            return {"text_1": prompt_text(prompt), "text_2": candidate.text}
        return {"messages": conversation(prompt, candidate.text)}
