"""Stands between `alpaca_eval` and the judge: a local server that remembers every answer.

The package asks as if it spoke with the judge. So what it asked before a kill is answered from the journal, retries and
rate limits are those of :class:`Endpoint`, the judge's key stays in this process, and which model answered is known.

Requests spend the judge's key, so only those of the package are served: each must carry a token that is drawn for this
run. A web page that the user has open cannot send it, nor can another user of the machine, who sees the port only.
"""

from __future__ import annotations

import hmac
import json
import secrets
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from nemo_lmpo.answers.endpoint import Endpoint
from nemo_lmpo.answers.journal import Journal
from nemo_lmpo.errors import UserError
from nemo_lmpo.runtime.files import content_hash

Check = Callable[[dict[str, Any]], None]
COMPLETIONS_PATH = "/v1/chat/completions"
MAX_BODY_BYTES = 16 * 2**20
"""Of a request; a judge's prompt has some ten thousand bytes."""


class JsonHandler(BaseHTTPRequestHandler):
    """Reads and answers requests; subclasses have `do_GET`, `do_POST` and so on."""

    protocol_version = "HTTP/1.1"
    timeout = 60
    """Seconds that a client may be silent within a request."""

    def body(self) -> bytes:
        """What the request carries."""
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def refuse(self, status: int, message: str) -> None:
        """Answer with an error and close the connection, as the request's body was not read."""
        self.close_connection = True
        self.send_json(status, {"error": {"message": message}})

    def send_json(self, status: int, content: Any) -> None:
        """Answer the request."""
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are nobody's fault; anything else is one of this program."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


@contextmanager
def serve(handler: type[JsonHandler], port: int = 0) -> Iterator[str]:
    """Serve in threads of this process while the context is open; the server's address, by default on a free port."""
    server = _Server(("127.0.0.1", port), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def refusal(path: str, headers: Message, host: str, token: str) -> tuple[int, str] | None:
    """Why a request to the gateway is not served, as status and sentence; None: it is served.

    Args:
        path: of the request.
        headers: of the request.
        host: the gateway's own address and port.
        token: that the request must carry.
    """
    # A page of another site can reach this port under a name of its own (DNS rebinding), or send a request blindly.
    if headers.get("Origin") is not None or headers.get("Host") != host:
        return 403, "this server takes no requests of web pages"
    given = headers.get("Authorization", "")
    if not hmac.compare_digest(given.encode(errors="replace"), f"Bearer {token}".encode()):
        return 401, "this server takes requests of the evaluation that started it only"
    if path != COMPLETIONS_PATH:
        return 404, f"this server has {COMPLETIONS_PATH} only"
    length = headers.get("Content-Length", "")
    if not (length.isascii() and length.isdigit()):
        return 411, "a request needs a Content-Length"
    if int(length) > MAX_BODY_BYTES:
        return 413, f"a request has at most {MAX_BODY_BYTES} bytes"
    return None


class Gateway:
    """Answers `/v1/chat/completions` on this machine, once it is opened, to those who know :attr:`token`.

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
        self.token = secrets.token_urlsafe(32)
        """The bearer token that each request must carry."""
        self._endpoint, self._journal, self._check, self._on_answer = endpoint, journal, check, on_answer

    @contextmanager
    def open(self) -> Iterator[Gateway]:
        """Serve at :attr:`url` while the context is open."""
        gateway = self

        class Handler(JsonHandler):
            def do_POST(self) -> None:
                host = gateway.url.removeprefix("http://").removesuffix("/v1")
                refused = refusal(self.path, self.headers, host, gateway.token)
                if refused is not None:
                    return self.refuse(*refused)
                try:
                    content = json.loads(self.body())
                except (ValueError, RecursionError):
                    content = None
                if not isinstance(content, dict):
                    return self.refuse(400, "a request is a JSON object")
                try:
                    response = gateway.respond(content)
                except UserError as error:
                    # 400: the client must not try again by itself.
                    return self.send_json(400, {"error": {"message": str(error)}})
                self.send_json(200, response)
                return gateway._on_answer()

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
