"""Stands between `alpaca_eval` and the judge: a local server that remembers every answer.

The package asks as if it spoke with the judge. So what it asked before a kill is answered from the journal, retries and
rate limits are those of :class:`Endpoint`, the judge's key stays in this process, and which model answered is known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from nemo_lmpo.answers.journal import Journal
from nemo_lmpo.answers.judge import JudgeServer
from nemo_lmpo.answers.replies import NOT_SAID, ChatReply, TopToken, parse_chat
from nemo_lmpo.answers.workers import Failures, ItemError
from nemo_lmpo.errors import UserError
from nemo_lmpo.evaluate.local_server import TokenServer
from nemo_lmpo.runtime.files import content_hash

Check = Callable[[ChatReply], None]
COMPLETIONS_PATH = "/v1/chat/completions"


class Gateway(TokenServer):
    """Answers `/v1/chat/completions` for the judge.

    Args:
        judge: asked for what the journal has not.
        journal: keyed by `key`; answers are kept in it.
        total: requests that the package will make.
        check: raises :class:`ItemError` for an answer that cannot be used.
        on_answer: called for each answer, new or remembered.
    """

    def __init__(
        self,
        judge: JudgeServer,
        journal: Journal,
        total: int,
        check: Check,
        on_answer: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(COMPLETIONS_PATH)
        self.failures = Failures(total)
        self.refused: set[str] = set()
        """Keys of requests that the judge declined."""
        self._judge, self._journal, self._check, self._on_answer = judge, journal, check, on_answer

    def respond(self, body: dict[str, Any]) -> dict[str, Any]:
        """The judge's answer to a request, in the package's form.

        One without a usable answer gets one that has no preference, so that the package continues with the others;
        :attr:`failures` tells afterwards.

        Raises:
            UserError: nothing more is asked.
        """
        key = content_hash(body)
        reply = self._remembered(key) or self._new(key, body)
        self._on_answer()
        return as_package_reads(reply)

    def _remembered(self, key: str) -> ChatReply | None:
        row = self._journal.rows.get(key)
        if row is None:
            return None
        if row.get("refused"):
            self.refused.add(key)
            return NO_PREFERENCE
        return parse_chat(row["response"])

    def _new(self, key: str, body: dict[str, Any]) -> ChatReply:
        if self.failures.stop.is_set():
            raise UserError("the judge is not asked any more")
        try:
            self._ask(key, body)
        except ItemError as error:
            self.failures.add(error)
            return NO_PREFERENCE
        except BaseException as error:
            self.failures.add(error)
            raise
        return self._remembered(key) or NO_PREFERENCE

    def _ask(self, key: str, body: dict[str, Any]) -> None:
        judgment = self._judge.ask(body, self.failures.stop)
        if judgment.reply.refusal is None:
            try:
                self._check(judgment.reply)
            except ItemError as error:
                # Before the first success it is not this request, but the server.
                kind = ItemError if self.failures.any_success else UserError
                raise kind(f"{self._judge.endpoint.option} {self._judge.endpoint.shown}: {error}") from None
        self._journal.append({"key": key, "response": judgment.raw, "refused": judgment.reply.refusal})
        self.failures.success()


NO_PREFERENCE = ChatReply(" ", None, "stop", NOT_SAID, (TopToken(" ", 0.0),))
"""Neither of the labels, which the package counts as no preference."""


def as_package_reads(reply: ChatReply) -> dict[str, Any]:
    """A judge's answer as the package's OpenAI client wants it, whatever the judge's server left out or added."""
    tokens = [{"token": one.token, "logprob": one.logprob, "bytes": None} for one in reply.top_tokens]
    choice = {
        "index": 0,
        "finish_reason": reply.finish_reason or "stop",
        "message": {"role": "assistant", "content": reply.text or " "},
        "logprobs": {"content": [{**tokens[0], "top_logprobs": tokens}] if tokens else []},
    }
    usage = {"prompt_tokens": 0, "completion_tokens": 1, "total_tokens": 1}
    content = {"id": "0", "created": 0, "object": "chat.completion", "model": reply.model}
    return {**content, "choices": [choice], "usage": usage}


def answering_models(journal: Journal) -> dict[str, int]:
    """How many judgments each model gave, by the name that it answered with."""
    rows = [row for row in journal.rows.values() if not row.get("refused")]
    return dict(Counter(parse_chat(row["response"]).model for row in rows))
