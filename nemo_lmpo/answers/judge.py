"""The judge behind its server: how it wants to be asked, and what of its answers is a judgment."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_lmpo.answers.endpoint import Endpoint, RefusedError
from nemo_lmpo.answers.replies import NOT_SAID, ChatReply, parse_chat
from nemo_lmpo.answers.sampling import NEUTRAL, named_in
from nemo_lmpo.errors import ConfigError, shown

CHAT = "chat/completions"
_FIXED = ("model", "messages", "stream", "n", "logprobs", "top_logprobs")
"""What `--judge-extra` may not change: the judgment would not be what the suite asks for."""

_logger = logging.getLogger("nemo_lmpo")


@dataclass(frozen=True)
class Judgment:
    """One answer of the judge."""

    reply: ChatReply
    raw: Mapping[str, Any]
    """The server's JSON; empty where it declined the request."""


def parse_extra(text: str) -> dict[str, Any]:
    """What `--judge-extra` says.

    Raises:
        ConfigError: it is not a JSON object, or changes what the suite fixes.
    """
    try:
        extra = json.loads(text)
        json.dumps(extra, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        extra = None
    if not isinstance(extra, dict):
        raise ConfigError(
            f'--judge-extra {shown(text)} is not a JSON object; give one such as \'{{"reasoning_effort": "low"}}\''
        )
    fixed = [name for name in _FIXED if name in extra]
    if fixed:
        raise ConfigError(f"--judge-extra must not set {fixed[0]}, which the suite does; leave it out")
    return extra


@dataclass
class JudgeServer:
    """Asks a judge; learns from its first refusals which parameters it takes.

    Args:
        endpoint: its server.
        name: its name there.
        extra: merged into every request; null removes a parameter.
    """

    endpoint: Endpoint
    name: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    _left_out: set[str] = field(default_factory=set)
    _renamed: dict[str, str] = field(default_factory=dict)
    _worked: bool = False
    """Whether a request was served, as they are made now."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, body: Mapping[str, Any], stop: threading.Event) -> Judgment:
        """One judgment.

        Args:
            body: a request to `/v1/chat/completions`.
            stop: as for :meth:`Endpoint.post`.

        Raises:
            UserError: as of :meth:`Endpoint.post`; that the judge declines is not an error.
        """
        while True:
            sent = self._request(body)
            try:
                judgment = self.endpoint.post(CHAT, sent, lambda raw: Judgment(parse_chat(raw), raw), stop=stop)
                self._worked = True
                return judgment
            except RefusedError as error:
                if error.said.refusal:
                    reason = error.said.code or error.said.message
                    return Judgment(ChatReply(None, reason, None, NOT_SAID, ()), {})
                if not self._learn(error, sent):
                    raise

    def _request(self, body: Mapping[str, Any]) -> dict[str, Any]:
        with self._lock:
            left_out, renamed = set(self._left_out), dict(self._renamed)
        request = {**NEUTRAL, **body}
        request = {renamed.get(name, name): value for name, value in request.items() if name not in left_out}
        request.update(self.extra)
        return {name: value for name, value in request.items() if value is not None}

    def _learn(self, error: RefusedError, sent: Mapping[str, Any]) -> bool:
        """Whether the request can be asked otherwise."""
        if error.status not in (400, 422):
            return False
        said = f"{error.said.param} {error.said.message}"
        with self._lock:
            if self._request_differs(sent):  # another thread learned it meanwhile
                return True
            named = named_in(said, sent)
            if "max_tokens" in named and re.search(r"\bmax_completion_tokens\b", said):
                self._renamed["max_tokens"] = "max_completion_tokens"
                return True
            removable = named & {*NEUTRAL, "temperature"} - set(self.extra)
            if not removable and not named and not self._worked:
                removable = set(NEUTRAL) & set(sent) - set(self.extra)  # it does not say which
            self._left_out |= removable
        if removable:
            names = ", ".join(sorted(removable))
            _logger.warning(
                "the judge %s refuses %s (%s): it is asked without, so its own values apply",
                *(self.name, names, error.said.message[:120]),
            )
        return bool(removable)

    def _request_differs(self, sent: Mapping[str, Any]) -> bool:
        return bool(self._left_out & set(sent) - set(self.extra)) or any(name in sent for name in self._renamed)
