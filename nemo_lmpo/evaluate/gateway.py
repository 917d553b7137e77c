"""Stands between `alpaca_eval` and the judge: a local server that remembers every answer.

The package asks as if it spoke with the judge. So what it asked before a kill is answered from the journal, retries and
rate limits are those of :class:`Endpoint`, the judge's key stays in this process, and which model answered is known.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from nemo_lmpo.errors import UserError
from nemo_lmpo.evaluate.endpoint import Endpoint
from nemo_lmpo.evaluate.storage import Journal, content_hash

Check = Callable[[dict[str, Any]], None]


class Gateway:
    """Serve `/v1/chat/completions` on this machine while the context is open.

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
        self._endpoint, self._journal, self._check, self._on_answer = endpoint, journal, check, on_answer
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

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

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                try:
                    self._send(200, gateway.respond(body))
                    gateway._on_answer()
                except UserError as error:
                    # 400: the client must not try again by itself.
                    self._send(400, {"error": {"message": str(error)}})

            def _send(self, status: int, content: dict[str, Any]) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                """Silent."""

        return Handler

    def __enter__(self) -> Gateway:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def answering_models(journal: Journal) -> dict[str, int]:
    """How many answers each model gave, by the name that it answered with."""
    return dict(Counter(str(row["response"].get("model", "not said")) for row in journal.rows.values()))
