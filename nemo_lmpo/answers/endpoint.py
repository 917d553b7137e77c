"""An OpenAI-compatible server over HTTP: retries with back-off, a rate limit, and errors that a user can act on."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from nemo_lmpo.errors import ConfigError, UserError, remember_secret
from nemo_lmpo.runtime.credentials import Address

_PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses that another try may not meet."""
_KEPT = "what is answered so far is kept, so repeat the command to go on"
Item = TypeVar("Item")


@dataclass(frozen=True)
class Limits:
    """How hard a server may be asked."""

    concurrency: int = 16
    requests_per_minute: float | None = None
    retries: int = 8
    backoff: float = 1.0
    """Seconds before the second retry; doubles up to a minute. A server's Retry-After wins."""
    timeout: float = 900.0

    def validate(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            ConfigError: naming the option.
        """
        if self.concurrency < 1:
            raise ConfigError(f"--concurrency {self.concurrency} must be at least 1")
        if self.requests_per_minute is not None and not self.requests_per_minute > 0:
            raise ConfigError(f"--requests-per-minute {self.requests_per_minute} must be above 0")
        if self.retries < 0:
            raise ConfigError(f"--retries {self.retries} must be 0 or more")


class _Pace:
    """Lets one request pass at a time, so many seconds apart."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Return when the next request may go."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._gap
        if turn > now:
            time.sleep(turn - now)


class Endpoint:
    """A server.

    Args:
        option: the command's option that named it, for errors.
        url: with or without `/v1`.
        limits: how hard it may be asked.
        key: sent as the bearer token; never written anywhere.
        key_variable: where the key came from, for errors.
    """

    def __init__(
        self, option: str, url: str, limits: Limits, *, key: str | None = None, key_variable: str = ""
    ) -> None:
        limits.validate()
        self.address = _read_address(option, url)
        base = self.address.shown.rstrip("/")
        self.base = base if base.endswith("/v1") else f"{base}/v1"
        self.option, self.limits, self._key, self._key_variable = option, limits, key, key_variable
        remember_secret(key)
        self._pace = _Pace(limits.requests_per_minute)
        self._session = self._open(limits.retries)

    def _open(self, retries: int) -> requests.Session:
        session = open_session(retries, self.limits.backoff, self.limits.concurrency)
        if self._key:
            session.headers["Authorization"] = f"Bearer {self._key}"
        session.headers.update(self.address.headers())
        session.params = dict(self.address.query)
        return session

    @property
    def shown(self) -> str:
        """The address without anything secret."""
        return self.base

    def served_models(self) -> list[str]:
        """Names that the server answers to; empty if it does not say. Tells at once whether it is there.

        Raises:
            UserError: it does not answer.
        """
        try:
            with self._open(1) as session:
                answer = session.get(f"{self.base}/models", timeout=30)
            content = answer.json() if answer.ok else {}
        except requests.exceptions.JSONDecodeError:
            content = {}
        except requests.RequestException as error:
            raise self._unreachable(error) from None
        if answer.status_code in (401, 403):
            raise self._refused(answer)
        listed = content.get("data") if isinstance(content, dict) else None
        return [str(model["id"]) for model in listed or [] if isinstance(model, dict) and "id" in model]

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask, again if need be.

        Raises:
            UserError: it does not answer, or refuses the request.
        """
        self._pace.wait()
        try:
            answer = self._session.post(f"{self.base}/{path}", json=body, timeout=self.limits.timeout)
        except requests.RequestException as error:
            raise self._unreachable(error) from None
        if not answer.ok:
            raise self._refused(answer)
        try:
            content: dict[str, Any] = answer.json()
        except requests.exceptions.JSONDecodeError:
            raise UserError(f"{self.option} {self.shown} answers with something that is not JSON; {_KEPT}") from None
        return content

    def _unreachable(self, error: Exception) -> UserError:
        cause: Any = error
        while getattr(cause, "__context__", None) is not None:
            cause = cause.__context__
        return UserError(f"{self.option} {self.shown} does not answer ({type(cause).__name__}); start it; {_KEPT}")

    def _refused(self, answer: Any) -> UserError:
        try:
            content = answer.json()
            error = content.get("error", content)
            said = str(error.get("message", error) if isinstance(error, dict) else error)
        except (requests.exceptions.JSONDecodeError, AttributeError):
            said = answer.text
        said = " ".join(said.split())[:300]
        advice = ""
        if answer.status_code in (401, 403):
            advice = f"; set {self._key_variable or 'its key'}"
        elif answer.status_code in _PASSING:
            advice = f" after {self.limits.retries} retries"
        return UserError(f"{self.option} {self.shown} says {answer.status_code} ({said}){advice}; {_KEPT}")


def _read_address(option: str, url: str) -> Address:
    try:
        address = Address.of(url)
    except ValueError:
        address = None
    if address is None or not re.match(r"https?://[^/]", address.shown):
        # What stands before the `@` may be a password.
        given = url.rpartition("@")[2].partition("?")[0]
        raise ConfigError(f"{option} {given} is not a URL; give one such as http://localhost:8000/v1")
    return address


def open_session(retries: int, backoff: float = 1.0, connections: int = 1) -> requests.Session:
    """A session that asks again where that may help."""
    retry = Retry(
        total=retries,
        backoff_factor=backoff,
        backoff_max=60,
        backoff_jitter=backoff / 2,
        status_forcelist=_PASSING,
        allowed_methods=None,  # also POST: asking again costs a call, not a wrong result
        raise_on_status=False,
    )
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=connections))
    return session


def choose_model(endpoint: Endpoint, wanted: str | None, name_option: str) -> str:
    """The name to ask for: as wanted, or the only one that is served.

    Raises:
        ConfigError: there are several, or none is told, or the wanted one is not there.
        UserError: the server does not answer.
    """
    served = endpoint.served_models()
    if wanted is not None:
        # Large services list aliases only in part, so only a short list is taken for complete.
        if served and len(served) <= 8 and wanted not in served:
            raise ConfigError(f"{name_option} {wanted} is not served by {endpoint.shown}; it has {', '.join(served)}")
        return wanted
    if len(served) == 1:
        return served[0]
    told = f"serves {len(served)} models" if served else "does not say what it serves"
    raise ConfigError(f"{endpoint.shown} {told}; name one with {name_option}")


def for_each(items: Sequence[Item], work: Callable[[Item], object], concurrency: int) -> None:
    """Do the work on several threads; at the first error the rest is not begun, and the error is raised."""
    with ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    for future in futures:
        if not future.cancelled():
            future.result()
