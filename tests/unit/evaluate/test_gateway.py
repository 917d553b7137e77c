"""Only the evaluation that started the gateway spends the judge's key: no other user, and no page in a browser."""

from __future__ import annotations

import http.client
import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from nemo_lmpo.answers.endpoint import Endpoint, Limits
from nemo_lmpo.answers.journal import Journal
from nemo_lmpo.answers.judge import JudgeServer
from nemo_lmpo.evaluate.alpaca_eval import check_logprobs
from nemo_lmpo.evaluate.gateway import COMPLETIONS_PATH, Gateway
from nemo_lmpo.evaluate.local_server import MAX_BODY_BYTES
from tests.system.stub_server import MODEL, Stub, serving

KEY = "the judge's key"
BODY = json.dumps(
    {
        "model": MODEL,
        "logprobs": True,
        "messages": [{"role": "user", "content": '"output": """a b""" "output": """a a"""'}],
    }
).encode()


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving() as running:
        yield running


@pytest.fixture
def gateway(stub: Stub, tmp_path: Path) -> Iterator[Gateway]:
    judge = JudgeServer(Endpoint("--judge-endpoint", stub.url, Limits(retries=0), key=KEY), MODEL)
    with Journal(tmp_path / "calls", "key") as journal, Gateway(judge, journal, 1, check_logprobs).open() as running:
        yield running


def address(gateway: Gateway) -> tuple[str, int]:
    parts = urlsplit(gateway.base)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


def request(
    gateway: Gateway, method: str = "POST", path: str = COMPLETIONS_PATH, body: bytes = BODY, **headers: str | None
) -> tuple[int, bytes]:
    """A request as the package sends it, but for what is named; a header that is None is left out."""
    host, port = address(gateway)
    wanted = {
        "Host": f"{host}:{port}",
        "Authorization": f"Bearer {gateway.token}",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **headers,
    }
    connection = http.client.HTTPConnection(host, port, timeout=10)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in wanted.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_its_own_requests_are_served(gateway: Gateway, stub: Stub) -> None:
    status, content = request(gateway)
    assert (status, "choices" in json.loads(content)) == (200, True)
    assert len(stub.requests) == 1


def test_it_listens_on_this_machine_only(gateway: Gateway) -> None:
    host, port = address(gateway)
    assert host == "127.0.0.1"
    with socket.socket() as other:  # 127.0.0.2 is of this machine, too, and must be free
        other.bind(("127.0.0.2", port))


def test_the_token_is_another_one_each_time(gateway: Gateway, tmp_path: Path) -> None:
    judge = JudgeServer(Endpoint("--judge-endpoint", "http://localhost:1", Limits()), MODEL)
    with Journal(tmp_path / "others", "key") as journal:
        assert Gateway(judge, journal, 1, check_logprobs).token != gateway.token
    assert len(gateway.token) >= 43  # 256 bits


@pytest.mark.parametrize(
    ("status", "changes"),
    [
        (401, {"Authorization": None}),
        (401, {"Authorization": "Bearer none"}),
        (401, {"Authorization": "Bearer "}),
        (401, {"Authorization": "Bearer \u00e4"}),
        (401, {"Authorization": f"Bearer {KEY}"}),
        (403, {"Origin": "https://example.com"}),
        (403, {"Origin": "null"}),
        (403, {"Origin": "http://127.0.0.1"}),
        (403, {"Host": None}),
        (403, {"Host": "example.com"}),
        (403, {"Host": "localhost"}),
        (403, {"Host": "127.0.0.1"}),
        (404, {"path": "/"}),
        (404, {"path": "/v1/models"}),
        (404, {"path": COMPLETIONS_PATH + "/../completions"}),
        (411, {"Content-Length": None, "body": b""}),
        (411, {"Content-Length": "-1", "body": b""}),
        (411, {"Content-Length": "ten", "body": b""}),
        (413, {"Content-Length": str(MAX_BODY_BYTES + 1), "body": b""}),
        (400, {"body": b"{"}),
        (400, {"body": b"[]"}),
        (400, {"body": b"\xff"}),
        (400, {"body": b"[" * 100_000}),
        *((501, {"method": method}) for method in ("GET", "PUT", "OPTIONS", "DELETE", "HEAD")),
    ],
)
def test_others_are_refused_and_nothing_is_asked(
    gateway: Gateway, stub: Stub, status: int, changes: dict[str, Any]
) -> None:
    answered, content = request(gateway, **changes)
    assert answered == status
    assert gateway.token.encode() not in content
    assert KEY.encode() not in content
    assert not stub.requests
    assert not gateway.failures.stop.is_set()
    assert request(gateway)[0] == 200, "a refused request ends nothing"


def test_a_page_may_not_read_or_ask_first(gateway: Gateway) -> None:
    """No answer allows another origin, so a browser hands nothing to a page and sends no request with a token."""
    host, port = address(gateway)
    connection = http.client.HTTPConnection(host, port, timeout=10)
    connection.request("OPTIONS", COMPLETIONS_PATH, headers={"Origin": "https://example.com"})
    answer = connection.getresponse()
    assert not [name for name, _ in answer.getheaders() if name.lower().startswith("access-control-")]
    connection.close()


def test_a_client_that_goes_away_is_silent(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    host, port = address(gateway)
    head = f"POST {COMPLETIONS_PATH} HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {gateway.token}\r\n"
    whole = f"{head}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY
    for sent in (whole[:20], whole[:-5], whole, whole, whole):
        with socket.create_connection((host, port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset when closed
            client.sendall(sent)
    assert request(gateway)[0] == 200
    assert capsys.readouterr().err == ""
