"""A local server whose answers a test gives, and which keeps what it was asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from nemo_lmpo.evaluate.local_server import JsonHandler, serve

Reply = tuple[int, Any]


class Answering(Protocol):
    """What a test says of its server."""

    url: str
    asked: list[dict[str, Any]]

    def answers(self, body: dict[str, Any], /) -> Reply:
        """Status and content for a request."""


Server = TypeVar("Server", bound=Answering)


@contextmanager
def serving_answers(server: Server) -> Iterator[Server]:
    """Serve at ``server.url`` while the context is open."""

    class Handler(JsonHandler):
        def do_POST(self) -> None:
            body = json.loads(self.body())
            server.asked.append(body)
            self.send_json(*server.answers(body))

    with serve(Handler) as url:
        server.url = url
        yield server
