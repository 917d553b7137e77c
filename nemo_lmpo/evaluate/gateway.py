"""Stands between `alpaca_eval` and the judge: a local server that remembers every answer.

The package asks as if it spoke with the judge. So what it asked before a kill is answered from the journal, retries and
rate limits are those of :class:`Endpoint`, the judge's key stays in this process, and which model answered is known.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from nemo_lmpo.errors import UserError
from nemo_lmpo.evaluate.endpoint import Endpoint
from nemo_lmpo.evaluate.storage import Journal, content_hash

Check = Callable[[dict[str, Any]], None]


class JsonHandler(BaseHTTPRequestHandler):
    """Reads and answers requests; subclasses have `do_GET`, `do_POST` and so on."""

    protocol_version = "HTTP/1.1"

    def body(self) -> bytes:
        """What the request carries."""
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send_json(self, status: int, content: Any) -> None:
        """Answer the request."""
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@contextmanager
def serve(handler: type[JsonHandler], port: int = 0) -> Iterator[str]:
    """Serve in threads of this process while the context is open; the server's address, by default on a free port."""
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


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
