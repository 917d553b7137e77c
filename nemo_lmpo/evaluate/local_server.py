"""A server on this machine that a program of the scoring environment asks instead of the real one.

Requests spend a key, so only those of that program are served: each must carry a token that is drawn for this run. A
web page that the user has open cannot send it, nor can another user of the machine, who sees the port only.
"""

from __future__ import annotations

import hmac
import json
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from nemo_lmpo.answers.http import Stopped
from nemo_lmpo.errors import UserError
from nemo_lmpo.runtime.threads import Thread

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

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own, as the base class, and on this one's GPU."""
        Thread(self.process_request_thread, request, client_address, name="request").start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are nobody's fault; anything else is one of this program."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


@contextmanager
def serve(handler: type[JsonHandler], port: int = 0) -> Iterator[str]:
    """Serve in threads of this process while the context is open; the server's address, by default on a free port."""
    server = _Server(("127.0.0.1", port), handler)
    Thread(server.serve_forever, 0.05, name="server").start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def refusal(path: str, served: str, headers: Message, host: str, token: str) -> tuple[int, str] | None:
    """Why a request is not served, as status and sentence; None: it is served.

    Args:
        path: of the request.
        served: the only path there is.
        headers: of the request.
        host: the server's own address and port.
        token: that the request must carry.
    """
    # A page of another site can reach this port under a name of its own (DNS rebinding), or send a request blindly.
    if headers.get("Origin") is not None or headers.get("Host") != host:
        return 403, "this server takes no requests of web pages"
    given = headers.get("Authorization", "")
    if not hmac.compare_digest(given.encode(errors="replace"), f"Bearer {token}".encode()):
        return 401, "this server takes requests of the evaluation that started it only"
    if path != served:
        return 404, f"this server has {served} only"
    length = headers.get("Content-Length", "")
    if not (length.isascii() and length.isdigit()):
        return 411, "a request needs a Content-Length"
    if int(length) > MAX_BODY_BYTES:
        return 413, f"a request has at most {MAX_BODY_BYTES} bytes"
    return None


class TokenServer:
    """Answers one path on this machine, once it is opened, to those who know :attr:`token`; subclasses respond.

    Args:
        path: that is served.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.base = ""
        """The address, with `/v1`, once it is open."""
        self.token = secrets.token_urlsafe(32)
        """The bearer token that each request must carry."""

    def respond(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            UserError: there is none; the client sees status 400, after which it should not try again.
            Stopped: as a :class:`UserError`.
        """
        raise NotImplementedError

    @contextmanager
    def open(self) -> Iterator[Self]:
        """Serve while the context is open."""
        own = self

        class Handler(JsonHandler):
            def do_POST(self) -> None:
                host = own.base.removeprefix("http://").removesuffix("/v1")
                refused = refusal(self.path, own.path, self.headers, host, own.token)
                if refused is not None:
                    self.refuse(*refused)
                    return
                try:
                    content = json.loads(self.body())
                except (ValueError, RecursionError):
                    content = None
                if not isinstance(content, dict):
                    self.refuse(400, "a request is a JSON object")
                    return
                try:
                    response = own.respond(content)
                except (UserError, Stopped) as error:
                    self.send_json(400, {"error": {"message": str(error)}})
                    return
                self.send_json(200, response)

        with serve(Handler) as url:
            self.base = f"{url}/v1"
            yield self
