"""An OpenAI-compatible server over HTTP: retries with back-off, a rate limit, and errors that a user can act on."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from nemo_lmpo.answers.http import RETRIED, Client, ExchangeError, Reply, Stopped
from nemo_lmpo.answers.replies import ReplyError, ServerError, decode, parse_error, parse_models
from nemo_lmpo.answers.workers import ItemError
from nemo_lmpo.errors import ConfigError, UserError, one_per_line, remember_secret, without_secrets
from nemo_lmpo.runtime.credentials import Address
from nemo_lmpo.settings import options_out_of_bounds, setting

_MODELS_DEADLINE = 30.0
_NEVER = threading.Event()
Value = TypeVar("Value")


class RefusedError(ItemError):
    """The server refuses one request."""

    def __init__(self, message: str, said: ServerError, status: int) -> None:
        super().__init__(message)
        self.said, self.status = said, status


@dataclass(frozen=True)
class Limits:
    """How hard a server may be asked."""

    concurrency: int = setting(16, minimum=1)
    requests_per_minute: float | None = setting(None, above=0)
    retries: int = setting(8, minimum=0)
    backoff: float = 1.0
    """Seconds before the second retry; doubles up to a minute. A server's Retry-After wins."""
    timeout: float = 900.0
    """Seconds that one try may take."""

    def validate(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            ConfigError: naming each option, one per line.
        """
        problems = list(options_out_of_bounds(self))
        if problems:
            raise ConfigError(one_per_line(problems))


class _Pace:
    """Lets one request pass at a time, so many seconds apart."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        """Return when the next request may go.

        Raises:
            Stopped: ``stop`` was set.
        """
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._gap
        if turn > now and stop.wait(turn - now):
            raise Stopped


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
        self.option, self.limits, self._key_variable = option, limits, key_variable
        self.address = _read_address(option, url)
        base = self.address.shown.rstrip("/")
        self.base = base if base.endswith("/v1") else f"{base}/v1"
        """Without anything secret."""
        remember_secret(key)
        self._pace = _Pace(limits.requests_per_minute)
        headers = {**_bearer(key, key_variable), **self.address.headers()}
        query = self.address.query
        self._client = Client(limits.timeout, connections=limits.concurrency, headers=headers, query=query)
        self._quick = Client(min(_MODELS_DEADLINE, limits.timeout), headers=headers, query=query)

    @property
    def shown(self) -> str:
        """The address without anything secret."""
        return self.base

    def served_models(self) -> list[str]:
        """Names that the server answers to; empty if it does not say. Tells at once whether it is there.

        Raises:
            UserError: it does not answer.
        """
        url = f"{self.base}/models"
        try:
            reply = self._quick.ask("GET", url, retries=1, backoff=self.limits.backoff, stop=_NEVER)
        except ExchangeError as error:
            raise self._failed(error) from None
        if reply.status in (401, 403) or 300 <= reply.status < 400:
            raise self._refused(reply, "models")
        if not reply.ok:
            return []
        try:
            return parse_models(decode(reply.content))
        except ReplyError:
            return []

    def post(
        self, path: str, body: Mapping[str, Any], parse: Callable[[Any], Value], *, stop: threading.Event = _NEVER
    ) -> Value:
        """Ask, again if need be.

        Args:
            path: `completions` or `chat/completions` behind `/v1`; one that begins with a slash stands without it.
            body: sent as JSON.
            parse: makes the value of the reply's JSON, or raises :class:`ReplyError`.
            stop: when it is set, nothing is tried again.

        Raises:
            ItemError: this request is not served as it should be; another one may be.
            UserError: the server does not answer at all, or nobody is served.
            Stopped: ``stop`` was set.
        """
        self._pace.wait(stop)
        try:
            reply = self._client.ask(
                "POST",
                self._url(path),
                body,
                retries=self.limits.retries,
                backoff=self.limits.backoff,
                stop=stop,
            )
        except ExchangeError as error:
            raise self._failed(error) from None
        if not reply.ok:
            raise self._refused(reply, path)
        try:
            return parse(decode(reply.content))
        except ReplyError as error:
            raise ItemError(
                f"{self.option} {self._url(path)} {error}; it must serve {_place(path)} as OpenAI's and vLLM's "
                "servers do"
            ) from None

    def _url(self, path: str) -> str:
        return self.base.removesuffix("/v1") + path if path.startswith("/") else f"{self.base}/{path}"

    def _failed(self, error: ExchangeError) -> UserError:
        remedy = "check that it runs and can be reached" if error.passing else "correct that, or use another server"
        kind = ItemError if "sends more than" in str(error) else UserError
        return kind(f"{self.option} {self.shown} {error}; {remedy}")

    def _refused(self, reply: Reply, path: str) -> UserError:
        said, status = parse_error(reply.content), reply.status
        what = f"{self.option} {self._url(path)} says {status}" + (f" ({said.message})" if said.message else "")
        if said.refusal:
            return RefusedError(f"{what}; it declines this prompt", said, status)
        if 300 <= status < 400:
            target = without_secrets(reply.headers.get("Location", ""))[:200]
            to = f" to {target}" if target.isprintable() and target else ""
            return UserError(f"{what} and redirects{to}; no prompt is sent there: give that address if you trust it")
        if status in (401, 403):
            return UserError(f"{what}; set {self._key_variable or 'its key'}")
        if status in (404, 405, 501):
            return UserError(f"{what}; it must serve {_place(path)}, and the model by the name that is asked for")
        if status in RETRIED:
            remedy = "lower --concurrency, or set --requests-per-minute" if status == 429 else "check its log"
            message = f"{what} after {self.limits.retries} retries; {remedy}"
            return UserError(message) if status == 429 else RefusedError(message, said, status)
        return RefusedError(f"{what}; check its log for what it does not accept", said, status)


def _place(path: str) -> str:
    return path if path.startswith("/") else f"/v1/{path}"


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


def _bearer(key: str | None, variable: str) -> dict[str, str]:
    alone = (key or "").strip(" \t\r\n")
    if not (alone.isascii() and alone.isprintable()):
        raise ConfigError(f"{variable} holds characters that no key has; set it to the key alone")
    return {"Authorization": f"Bearer {alone}"} if alone else {}


def choose_model(endpoint: Endpoint, wanted: str | None, name_option: str) -> str:
    """The name to ask for: as wanted, or the only one that is served.

    Raises:
        ConfigError: there are several, or none is named, or the wanted one is not there.
        UserError: the server does not answer.
    """
    served = endpoint.served_models()
    if wanted is not None:
        # Large services list aliases only in part, so only a short list is taken for complete.
        if served and len(served) <= 8 and wanted not in served:
            names = ", ".join(name[:100] for name in served)
            raise ConfigError(f"{name_option} {wanted} is not served by {endpoint.shown}; it has {names}")
        return wanted
    if len(served) == 1:
        return served[0]
    found = f"serves {len(served)} models" if served else "does not say what it serves"
    raise ConfigError(f"{endpoint.shown} {found}; name one with {name_option}")
