"""Stands between `alpaca_eval` and the judge: a local server that remembers every answer.

The package asks as if it spoke with the judge. So what it asked before a kill is answered from the journal, retries and
rate limits are those of :class:`Endpoint`, the judge's key stays in this process, and which model answered is known.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nemo_lmpo.errors import UserError
from nemo_lmpo.evaluate.endpoint import Endpoint
from nemo_lmpo.evaluate.local_server import JsonHandler, serve
from nemo_lmpo.evaluate.storage import Journal, content_hash

Check = Callable[[dict[str, Any]], None]


class Gateway:
    """Answers `/v1/chat/completions` on this machine, once it is opened.

    Args:
        endpoint: the judge.
        journal: keyed by `key`; answers are kept in it.
        check: raises :class:`UserError` for an answer that cannot be used.
        on_answer: called for each answer, new or remembered.
    """

    def __init__(
        self, endpoint: Endpoint, journal: Journal, check: Check, on_answer: Callable[[], object] = lambda: None
    ) -> None:
        self.failure: UserError | None = None
        """The first error; afterwards nothing is asked any more."""
        self.url = ""
        self._endpoint, self._journal, self._check, self._on_answer = endpoint, journal, check, on_answer

    @contextmanager
    def open(self) -> Iterator[Gateway]:
        """Serve at :attr:`url` while the context is open."""
        gateway = self

        class Handler(JsonHandler):
            def do_POST(self) -> None:
                try:
                    self.send_json(200, gateway.respond(json.loads(self.body())))
                    gateway._on_answer()
                except UserError as error:
                    # 400: the client must not try again by itself.
                    self.send_json(400, {"error": {"message": str(error)}})

        with serve(Handler) as url:
            self.url = f"{url}/v1"
            yield self

    def respond(self, body: dict[str, Any]) -> dict[str, Any]:
        """The judge's answer to a request.

        Raises:
            UserError: there is none.
        """
        key = content_hash(body)
        if key in self._journal.rows:
            remembered: dict[str, Any] = self._journal.rows[key]["response"]
            return remembered
        if self.failure is not None:
            raise self.failure
        try:
            response = self._endpoint.post("chat/completions", body)
            self._check(response)
        except UserError as error:
            self.failure = self.failure or error
            raise
        self._journal.append({"key": key, "response": response})
        return response


def answering_models(journal: Journal) -> dict[str, int]:
    """How many answers each model gave, by the name that it answered with."""
    return dict(Counter(str(row["response"].get("model", "not said")) for row in journal.rows.values()))
