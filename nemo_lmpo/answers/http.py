"""The package's only door to HTTP: every exchange has a deadline, a bound on its size, and stays with its host."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import requests
import urllib3
from requests.adapters import HTTPAdapter

from nemo_lmpo.runtime.threads import Thread

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses that another try may not meet."""
MAX_REPLY_BYTES = 64 * 2**20
MAX_WAIT = 600.0
"""Seconds that a server may ask to wait (Retry-After)."""
_CHUNK = 2**16
_MAX_BACKOFF = 60.0
Value = TypeVar("Value")


class ExchangeError(Exception):
    """No reply came; the message says what happened, as a clause without a subject."""

    def __init__(self, happened: str, *, passing: bool) -> None:
        super().__init__(happened)
        self.passing = passing
        """Whether another try may go better."""


class Stopped(Exception):
    """The work that the exchange belongs to has ended."""


@dataclass(frozen=True)
class Reply:
    """What came back, whole."""

    status: int
    headers: Mapping[str, str]
    """Names in any case."""
    content: bytes

    @property
    def ok(self) -> bool:
        """Whether the request was served."""
        return 200 <= self.status < 300

    @property
    def retry_after(self) -> float | None:
        """Seconds that the server asks to wait; None: it does not say, or nothing that means anything."""
        text = self.headers.get("Retry-After", "").strip()
        try:
            if text.isascii() and text.isdigit():
                return float(text)
            return max(0.0, parsedate_to_datetime(text).timestamp() - time.time()) if text else None
        except (ValueError, TypeError, OverflowError):
            return None


class _Headers(requests.auth.AuthBase):
    """Sends these headers, and nothing that a `.netrc` says: requests reads it where there is no authentication."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = dict(headers)

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers.update(self._headers)
        return request


class Client:
    """Sends requests, each try within a deadline.

    Args:
        deadline: seconds that a try may take from its first to its last byte.
        connections: kept open for further requests.
        headers: sent with each request.
        query: added to each address.
        redirects: whether to follow them; only for downloads, which carry neither a prompt nor a key.
    """

    def __init__(
        self,
        deadline: float,
        *,
        connections: int = 1,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
        redirects: bool = False,
    ) -> None:
        self._deadline, self._redirects = deadline, redirects
        self._session = requests.Session()
        self._session.auth = _Headers(headers or {})
        self._session.params = dict(query or {})
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=connections))

    def try_once(self, method: str, url: str, body: Any = None, *, max_bytes: int = MAX_REPLY_BYTES) -> Reply:
        """One try.

        Args:
            method: GET or POST.
            url: whole.
            body: sent as JSON; None: nothing is sent.
            max_bytes: longest reply.

        Raises:
            ExchangeError: there is no whole reply.
        """

        def exchange() -> Reply:
            with self._session.request(
                method, url, json=body, timeout=self._deadline, stream=True, allow_redirects=self._redirects
            ) as answer:
                content = bytearray()
                for chunk in answer.iter_content(_CHUNK):
                    content += chunk
                    if len(content) > max_bytes:
                        raise ExchangeError(f"sends more than {max_bytes // 2**20} MiB", passing=False)
                return Reply(answer.status_code, answer.headers, bytes(content))

        try:
            return _within(self._deadline, exchange)
        except TimeoutError:
            raise ExchangeError(f"does not answer within {self._deadline:g} seconds", passing=True) from None
        except requests.exceptions.SSLError as error:
            raise ExchangeError(f"has no valid TLS certificate ({_cause(error)})", passing=False) from None
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, UnicodeError, ValueError) as error:
            # requests' JSON and header errors are ValueErrors, too: of what was to be sent.
            raise ExchangeError(f"cannot be asked ({_cause(error)})", passing=False) from None
        except requests.exceptions.TooManyRedirects:
            raise ExchangeError("redirects in a circle", passing=False) from None
        except requests.exceptions.ContentDecodingError:
            raise ExchangeError("sends a reply that cannot be unpacked", passing=True) from None
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise ExchangeError(f"does not answer ({_cause(error)})", passing=True) from None

    def ask(
        self, method: str, url: str, body: Any = None, *, retries: int, backoff: float, stop: threading.Event
    ) -> Reply:
        """Try until there is a reply that another try would not change.

        Args:
            method: GET or POST: asking again costs a call, not a wrong result.
            url: whole.
            body: as for :meth:`try_once`.
            retries: tries after the first.
            backoff: seconds before the second retry; doubles up to a minute. A server's Retry-After wins.
            stop: ends the waiting between tries.

        Raises:
            ExchangeError: there is no reply after all tries, or the server asks to wait for too long.
            Stopped: ``stop`` was set.
        """
        for attempt in range(retries + 1):
            if stop.is_set():
                raise Stopped
            wait = _backoff(backoff, attempt)
            try:
                reply = self.try_once(method, url, body)
            except ExchangeError as error:
                if not error.passing or attempt == retries:
                    raise
            else:
                if reply.status not in RETRIED or attempt == retries:
                    return reply
                asked = reply.retry_after
                if asked is not None and asked > MAX_WAIT:
                    raise ExchangeError(
                        f"says {reply.status} and asks to wait for {asked:.0f} seconds (Retry-After)", passing=False
                    )
                wait = wait if asked is None else asked
            if stop.wait(wait):
                raise Stopped
        raise AssertionError("the last try returns or raises")

    def close(self) -> None:
        """Close the connections that no request uses."""
        self._session.close()


def _backoff(seconds: float, attempt: int) -> float:
    doubled = seconds * 2.0 ** min(attempt - 1, 30) if attempt else 0.0
    return min(doubled, _MAX_BACKOFF) + random.uniform(0, seconds / 2)


def _within(seconds: float, work: Callable[[], Value]) -> Value:
    """What the work returns or raises.

    It has a thread of its own, since nothing else bounds the resolving of a name or a reply that comes byte by byte. A
    thread that is too late is left behind; it ends with its connection, or with the process.

    Raises:
        TimeoutError: it takes longer.
    """
    outcome: queue.SimpleQueue[tuple[Value | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((work(), None))
        except BaseException as error:
            outcome.put((None, error))

    Thread(run, name="http").start()
    try:
        value, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def _cause(error: BaseException) -> str:
    """The kind of the first error of a chain, which says most; its text where the kind says nothing."""
    cause = error
    while cause.__context__ is not None:
        cause = cause.__context__
    name = type(cause).__name__
    return f"{name}: {str(cause)[:200]}" if isinstance(cause, ValueError) and str(cause).isprintable() else name
