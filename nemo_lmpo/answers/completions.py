"""A model behind a server: what its requests say, and whether the server can do what they say."""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_lmpo.answers.endpoint import Endpoint, RefusedError
from nemo_lmpo.answers.replies import Completion, check_echo, parse_completion
from nemo_lmpo.answers.sampling import NEUTRAL, Sampling
from nemo_lmpo.answers.workers import ItemError
from nemo_lmpo.errors import ConfigError

COMPLETIONS = "completions"
_ENDED = ("abort", "aborted", "cancelled", "error")
"""Reasons to finish that are neither the model's nor the limit's."""
_NEVER = threading.Event()

_logger = logging.getLogger("nemo_lmpo")


@dataclass(frozen=True)
class CompletionRequests:
    """Requests of one model and one way of sampling.

    All of what decides an answer is named in each: a server fills what is not with values of its own.
    """

    model: str
    """Its name at the server."""
    stop_ids: Sequence[int]
    sampling: Sampling

    def body(self, name: str, prompt: Sequence[int], room: int) -> dict[str, Any]:
        """Of one answer.

        Args:
            name: of the instruction; gives the answer a seed of its own, which does not depend on the others.
            prompt: token ids.
            room: tokens that the answer may have.
        """
        return {
            **NEUTRAL,
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": room,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "top_k": self.sampling.top_k or NEUTRAL["top_k"],
            "seed": (self.sampling.seed + zlib.crc32(name.encode())) % 2**31,
            "stop_token_ids": list(self.stop_ids),
            "skip_special_tokens": True,
        }


class PromptCountError(ItemError):
    """A server counts other tokens in a prompt than it was sent."""


def complete(endpoint: Endpoint, body: Mapping[str, Any], stop: threading.Event = _NEVER) -> Completion:
    """One answer.

    Raises:
        ItemError: this one is not to be had.
        PromptCountError: the server seems to put tokens of its own into prompts.
        UserError: as of :meth:`Endpoint.post`.
    """
    found = endpoint.post(COMPLETIONS, body, parse_completion, stop=stop)
    sent = len(body["prompt"])
    if found.prompt_tokens is not None and found.prompt_tokens != sent:
        raise PromptCountError(
            f"{endpoint.option} {endpoint.shown} counts {found.prompt_tokens} tokens in a prompt of which {sent} were "
            "sent: it adds its own (a second BOS?); use a server that takes token ids as they are"
        )
    if found.finish_reason in _ENDED:
        raise ItemError(
            f"{endpoint.option} {endpoint.shown} ended an answer early (finish_reason {found.finish_reason})"
        )
    return found


def refused_parameters(endpoint: Endpoint, body: Mapping[str, Any], refusal: RefusedError) -> list[str]:
    """Which parameters a server that refused a request does not take; empty if it takes each: the prompt was it.

    A few requests of one token each.

    Args:
        endpoint: the server.
        body: what it refused.
        refusal: what it said.

    Raises:
        ConfigError: it lacks what answers cannot do without; says what a server must be able to do.
    """
    least = {"model": body["model"], "prompt": body["prompt"][:4], "max_tokens": 1}
    if _is_refused(endpoint, least):
        raise ConfigError(
            f"{endpoint.option} {endpoint.shown} does not complete a prompt of token ids (it says {refusal.status}: "
            f"{refusal.said.message}); it must serve /v1/completions for them, as vllm serve and llama-server do"
        )
    refused = [name for name in body if name not in least and _is_refused(endpoint, {**least, name: body[name]})]
    needed = [name for name in refused if name not in NEUTRAL]
    if needed:
        raise ConfigError(
            f"{endpoint.option} {endpoint.shown} refuses {', '.join(needed)} (it says {refusal.status}: "
            f"{refusal.said.message}); it must take them in /v1/completions, as vllm serve does: without them, answers "
            "would be sampled or end in another way"
        )
    if refused:
        _logger.warning(
            "%s %s refuses %s: answers are asked for without, so the server's own values apply; start it with neutral "
            "ones",
            *(endpoint.option, endpoint.shown, ", ".join(refused)),
        )
    return refused


def _is_refused(endpoint: Endpoint, body: Mapping[str, Any]) -> bool:
    try:
        endpoint.post(COMPLETIONS, body, parse_completion)
    except RefusedError:
        return True
    return False


def refused_neutral(endpoint: Endpoint, model: str, prompt: Sequence[int]) -> list[str]:
    """Which of the neutral parameters a server does not take; says so.

    Args:
        endpoint: the server.
        model: its name there.
        prompt: a few token ids.

    Raises:
        UserError: as of :func:`refused_parameters`.
    """
    body = {**NEUTRAL, "model": model, "prompt": list(prompt), "max_tokens": 1, "temperature": 0}
    try:
        endpoint.post(COMPLETIONS, body, parse_completion)
    except RefusedError as error:
        return refused_parameters(endpoint, body, error)
    return []


def check_can_echo(endpoint: Endpoint, model: str, prompt: Sequence[int]) -> None:
    """See that a server gives the log-probabilities of prompts, which the leaderboard's tasks are scored with.

    Args:
        endpoint: the server.
        model: its name there.
        prompt: a few token ids.

    Raises:
        ConfigError: it does not; says what it must be able to do.
        UserError: it does not answer.
    """
    body = {"model": model, "prompt": [list(prompt)], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    try:
        endpoint.post(COMPLETIONS, body, lambda content: check_echo(content, [prompt]))
    except ItemError as error:
        raise ConfigError(
            f"{error}. The leaderboard's tasks need /v1/completions with `echo` and `logprobs` for prompts of token "
            "ids (vllm serve has them); use such a server, or leave --endpoint out"
        ) from None
