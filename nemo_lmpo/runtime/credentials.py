"""Credentials that users give: kept apart from what is shown, written to files and compared.

An address may hold a password (`https://user:password@host`) or a token (`?api_key=...`). It is taken apart where it is
read: everything that outlives the process gets :attr:`Address.shown`, and only what connects gets the rest.
"""

from __future__ import annotations

import base64
import logging
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from nemo_lmpo.errors import ConfigError, printable_lines, remember_secret, without_secrets
from nemo_lmpo.runtime.terminal import printable_record

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")
_NAMES_A_SECRET = re.compile(r"key|token|secret|pass|sig|auth|code|credential", re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Address:
    """A URL."""

    shown: str
    """Without credentials: no user, password, query and fragment."""
    whole: str = field(repr=False)
    """As it was given."""
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    query: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, text: str) -> Address:
        """Take a URL apart; its secrets are not shown by any message from now on.

        Raises:
            ValueError: it is not a URL; says nothing of what was given.
        """
        try:
            parts = urlsplit(text)
            host, port = parts.hostname, parts.port
        except ValueError:
            raise ValueError("not a URL") from None
        if not parts.scheme or "://" not in text:
            raise ValueError("not a URL")
        place = f"[{host}]" if host and ":" in host else host or ""
        shown = f"{parts.scheme}://{place}{f':{port}' if port else ''}{parts.path}"
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        remember_secret(parts.password, password)
        remember_secret(*(value for name, value in query.items() if _NAMES_A_SECRET.search(name)))
        return cls(shown, text, user, password, query)

    def headers(self) -> dict[str, str]:
        """What a request carries instead of the user part."""
        if not self.user and not self.password:
            return {}
        pair = base64.b64encode(f"{self.user}:{self.password}".encode()).decode("ascii")
        remember_secret(pair)
        return {"Authorization": f"Basic {pair}"}


_whole: dict[str, str] = {}
"""Addresses of settings as they were given, by what is shown of them; in this process only."""


def stripped(value: str) -> str:
    """A setting's text: of an address, what may be shown; anything else as it is. :func:`whole` has the rest."""
    if not _ADDRESS.fullmatch(value):
        return value
    try:
        address = Address.of(value)
    except ValueError:
        return value
    if not (address.user or address.password or address.query):
        return value
    _whole[address.shown] = value
    return address.shown


def whole(shown: str) -> str:
    """The address that :func:`stripped` made this of, for what connects to it."""
    return _whole.get(shown, shown)


def require_variable_name(option: str, given: str) -> str:
    """The name of an environment variable that holds a key.

    Raises:
        ConfigError: it cannot be one; it may be the key itself, so the message does not show it.
    """
    if not _VARIABLE.fullmatch(given):
        remember_secret(given)
        raise ConfigError(
            f"{option} is not the name of an environment variable; put the key into one, such as MY_KEY, and give "
            f"{option} MY_KEY"
        )
    return given


def hide_credentials() -> None:
    """From now on no log line and no traceback of this process shows credentials, those of libraries included.

    Nor do they show anything that is not printable (:mod:`nemo_lmpo.runtime.terminal`).
    """
    factory = logging.getLogRecordFactory()
    if not isinstance(factory, _Records):
        logging.setLogRecordFactory(_Records(factory))
        sys.excepthook = _show_error
        threading.excepthook = lambda arguments: _show_error(
            arguments.exc_type, arguments.exc_value, arguments.exc_traceback
        )


class _Records:
    """Makes log records whose text is complete, printable, and without credentials."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def __call__(self, *arguments: Any, **names: Any) -> logging.LogRecord:
        record: logging.LogRecord = self._make(*arguments, **names)
        try:
            text = printable_record(record)
        except (TypeError, ValueError, KeyError):  # its arguments do not fit: `logging` itself tells so
            return record
        record.msg, record.args = without_secrets(text), ()
        if record.exc_info and record.exc_info[1] is not None:
            traced = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
            record.exc_text = without_secrets(printable_lines(traced))
        return record


def _show_error(kind: type[BaseException], error: BaseException | None, place: TracebackType | None) -> None:
    if issubclass(kind, SystemExit):
        return
    sys.stderr.write(without_secrets(printable_lines("".join(traceback.format_exception(kind, error, place)))))
