"""A server that answers as it should, but for chosen requests, whose replies are damaged in every way we thought of.

A fault is a function that writes raw bytes to the connection; `FAULTS` are those that need no good reply, `damaged`
makes those that change a good one at each of its fields.
"""

from __future__ import annotations

import gzip
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nemo_lmpo.evaluate.local_server import JsonHandler, serve
from tests.system.stub_server import MODEL, Stub, chat, completion

Fault = Callable[["Handler", bytes], None]
"""Gets the handler, its request already read, and the reply that would be right."""
Handler = JsonHandler
BIG = 3 * 2**20
"""Bytes of a reply that is too long, where the bound is a MiB."""
DRIP_SECONDS = 0.05


def whole(status: int, content: bytes, **headers: str) -> bytes:
    """A reply as bytes."""
    lines = [f"HTTP/1.1 {status} Some Reason", "Content-Type: application/json", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if "Content_Length" not in headers and "Transfer_Encoding" not in headers:
        lines.append(f"Content-Length: {len(content)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def sends(content: bytes, *, reset: bool = False) -> Fault:
    """Write these bytes and close the connection."""

    def fault(handler: Handler, good: bytes) -> None:
        handler.close_connection = True
        handler.wfile.write(content)
        handler.wfile.flush()
        if reset:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()

    return fault


def says(status: int, content: bytes = b'{"error": {"message": "no"}}', **headers: str) -> Fault:
    """Reply with a status."""
    return sends(whole(status, content, **headers))


def changed(change: Callable[[bytes], bytes], **headers: str) -> Fault:
    """Reply with a changed good reply."""

    def fault(handler: Handler, good: bytes) -> None:
        says(200, change(good), **headers)(handler, good)

    return fault


def _drips(head: bytes) -> Fault:
    def fault(handler: Handler, good: bytes) -> None:
        handler.close_connection = True
        handler.wfile.write(head)
        for _ in range(int(3 / DRIP_SECONDS)):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(DRIP_SECONDS)

    return fault


def _gzip_bomb(good: bytes) -> bytes:
    return gzip.compress(b" " * BIG + good)


_ERRORS = {
    "plain": b"out of order",
    "html": b"<html><h1>Bad gateway</h1></html>",
    "empty": b"",
    "string": b'"no"',
    "list": b"[1, 2]",
    "null": b"null",
    "nested": b'{"error": {"message": {"a": [1]}, "code": 7, "param": [], "innererror": 3}}',
    "detail": b'{"detail": [{"loc": ["body"], "msg": "extra"}]}',
    "bytes": b"\xff\xfe\x00",
    "terminal": b'{"error": "\\u001b[2J\\u001b]0;x\\u0007\\nerror: forged\\ud800"}',
}
FAULTS: dict[str, Fault] = {
    **{f"status {status}": says(status) for status in (408, 409, 425, 429, 500, 502, 503, 504)},
    **{
        f"status {status}": says(status) for status in (400, 401, 402, 403, 404, 405, 410, 413, 415, 422, 451, 501, 599)
    },
    **{f"status 400 {name}": says(400, content) for name, content in _ERRORS.items()},
    **{f"status 500 {name}": says(500, content) for name, content in _ERRORS.items()},
    **{
        f"redirect {status} {place}": says(status, b"", Location=f"{place}/v1/models")
        for status in (301, 302, 303, 307, 308)
        for place in ("http://127.0.0.2:9", "https://user:secret@example.invalid", "//example.invalid", "")
    },
    "redirect nowhere": says(307, b""),
    "status 204": says(204, b""),
    "retry after long": says(429, Retry_After="100000"),
    "retry after a date": says(503, Retry_After="Wed, 21 Oct 2099 07:28:00 GMT"),
    **{f"retry after {text!r}": says(503, Retry_After=text) for text in ("-1", "nan", "x", "1e9", "\u00b2")},
    "html": says(200, b"<!doctype html><title>Log in</title>"),
    "empty": says(200, b""),
    **{f"json {text}": says(200, text.encode()) for text in ("null", "1", '"x"', "[]", "true", "{}", "[[[]]]", "-0.0")},
    **{f"json {text}": says(200, text.encode()) for text in ("NaN", "Infinity", '{"choices": [NaN]}', "1e999", "{]")},
    "long number": says(200, b"9" * 10_000),
    "deep list": says(200, b"[" * 100_000),
    "deep object": says(200, b'{"choices": ' * 50_000),
    "no choices": says(200, b'{"choices": []}'),
    "truncated": changed(lambda good: good[: len(good) // 2]),
    "last byte missing": changed(lambda good: good[:-1]),
    "twice": changed(lambda good: good * 2),
    "utf-16": changed(lambda good: good.decode().encode("utf-16"), Content_Type="application/json; charset=utf-16"),
    "unknown charset": changed(lambda good: good, Content_Type="application/json; charset=klingon"),
    "byte order mark": changed(lambda good: b"\xef\xbb\xbf" + good),
    "bytes that are no text": changed(lambda good: good.replace(b"o", b"\xff")),
    "half surrogates": changed(lambda good: good.replace(b"a", b"\\ud800").replace(b"\\ud800", b"a", 3)),
    "too long": says(200, b" " * BIG),
    "too long, chunked": changed(
        lambda good: b"".join(b"10000\r\n" + b" " * 2**16 + b"\r\n" for _ in range(BIG // 2**16)) + b"0\r\n\r\n",
        Transfer_Encoding="chunked",
    ),
    "gzip bomb": changed(_gzip_bomb, Content_Encoding="gzip"),
    "broken gzip": changed(lambda good: gzip.compress(good)[:-9] + b"123456789", Content_Encoding="gzip"),
    "not gzip": changed(lambda good: good, Content_Encoding="gzip"),
    "broken chunks": changed(lambda good: b"zz\r\n" + good, Transfer_Encoding="chunked"),
    "unfinished chunks": changed(lambda good: b"ffff\r\n" + good, Transfer_Encoding="chunked"),
    "shorter than announced": changed(lambda good: good, Content_Length="100000"),
    "length not a number": changed(lambda good: good, Content_Length="many"),
    "negative length": changed(lambda good: good, Content_Length="-5"),
    "no reply": sends(b""),
    "reset": sends(b"", reset=True),
    "reset in the head": sends(b"HTTP/1.1 200 OK\r\nContent-", reset=True),
    "reset in the body": sends(whole(200, b'{"choices": ', Content_Length="1000"), reset=True),
    "not http": sends(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "no status": sends(b"HTTP/1.1 abc\r\n\r\n"),
    "long header": sends(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000 + b"\r\n\r\n{}"),
    "many headers": sends(b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 500 + b"\r\n{}"),
    "drip of the head": _drips(b"HTTP/1.1 200 OK\r\nX:"),
    "drip of the body": _drips(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"),
}
_VALUES: tuple[Any, ...] = (None, 1, -1, 2.5, "x", "", [], [None], {}, True, 10**400, "\ud800")
_GONE = object()


def fields(content: Any) -> Iterator[tuple[str | int, ...]]:
    """The place of every field of a JSON value."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in items:
        yield (name,)
        yield from ((name, *rest) for rest in fields(value))


def damaged(content: Any) -> Iterator[tuple[str, Fault]]:
    """A reply with another value, or none, in each of its fields."""
    for place in fields(content):
        for value in (*_VALUES, _GONE):
            copy = json.loads(json.dumps(content))
            parent = copy
            for name in place[:-1]:
                parent = parent[name]
            if value is _GONE:
                del parent[place[-1]]
            else:
                parent[place[-1]] = value
            shown = "gone" if value is _GONE else json.dumps(value)[:12]
            yield f"{'.'.join(map(str, place))} = {shown}", says(200, json.dumps(copy).encode())


@dataclass
class FaultyServer:
    """A running server."""

    url: str = ""
    fault: Fault | None = None
    hits: Callable[[str, dict[str, Any]], bool] = lambda path, body: True
    """Which requests the fault is for."""
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def good_reply(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What the stub answers."""
    if path.endswith("/models"):
        return {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "x"}]}
    return (chat if path.endswith("/chat/completions") else completion)(Stub(), body)


@contextmanager
def faulty() -> Iterator[FaultyServer]:
    """A server in threads of this process."""
    server = FaultyServer()

    class Answering(JsonHandler):
        def _answer(self, body: dict[str, Any]) -> None:
            with server.lock:
                server.asked.append((self.path, body))
            good = json.dumps(good_reply(self.path, body)).encode()
            if server.fault is not None and server.hits(self.path, body):
                server.fault(self, good)
            else:
                sends(whole(200, good))(self, good)

        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            self._answer(json.loads(self.body()))

    with serve(Answering) as url:
        server.url = f"{url}/v1"
        yield server
