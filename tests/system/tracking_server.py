"""An MLflow tracking server for tests: what a run asks of it, and faults on order."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

RUN = {"info": {"run_id": "r1", "experiment_id": "1", "status": "RUNNING", "artifact_uri": "mlflow-artifacts:/1"}}
ANSWERS: dict[str, Any] = {
    "experiments/get-by-name": {"experiment": {"experiment_id": "1", "name": "e"}},
    "runs/create": {"run": RUN},
    "runs/get": {"run": RUN},
    "runs/update": {"run_info": RUN["info"]},
    "runs/log-batch": {},
}
FAULTS = ("500", "503", "429", "404", "hang", "refused", "reset", "not json")


@dataclass
class TrackingServer:
    """A server in threads of this process."""

    url: str = ""
    fault: str = ""
    """One of `FAULTS`; empty: it works."""
    metrics: list[tuple[int, str, float]] = field(default_factory=list)
    """Step, name and value of all that it took."""
    authorizations: list[str | None] = field(default_factory=list)
    """What each request said of who asks."""
    let_go: threading.Event = field(default_factory=threading.Event)
    """Ends the requests that hang."""
    listening: ThreadingHTTPServer | None = None

    def fail(self, fault: str) -> None:
        """From now on."""
        self.fault = fault
        if fault == "refused":
            assert self.listening is not None
            self.listening.shutdown()
            self.listening.server_close()


def _handler(server: TrackingServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        # A connection for each request: one that is kept would answer after the server is gone.
        protocol_version = "HTTP/1.0"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            server.authorizations.append(self.headers.get("Authorization"))
            if server.fault == "hang":
                server.let_go.wait()
            elif server.fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            elif server.fault == "not json":
                self.send(200, b"<html>\x1b[31mgateway</html>")
            elif server.fault:
                self.send(int(server.fault), b"<html>\r\n\x1b]0;title\x07sorry</html>")
            else:
                name = self.path.partition("/mlflow/")[2].partition("?")[0]
                if name == "runs/log-batch":
                    sent = json.loads(body).get("metrics", [])
                    server.metrics += [(int(one.get("step", 0)), one["key"], one["value"]) for one in sent]
                self.send(200, json.dumps(ANSWERS.get(name, {})).encode())

        do_GET = do_POST = do_PUT = answer

        def send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    return Handler


@contextmanager
def tracking_server() -> Iterator[TrackingServer]:
    server = TrackingServer()
    server.listening = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    server.listening.daemon_threads = True
    server.listening.handle_error = lambda *_: None  # type: ignore[method-assign]  # connections that were reset
    server.url = f"http://127.0.0.1:{server.listening.server_address[1]}"
    threading.Thread(target=server.listening.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.let_go.set()
        if server.fault != "refused":
            server.listening.shutdown()
            server.listening.server_close()
