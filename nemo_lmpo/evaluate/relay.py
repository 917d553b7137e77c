"""Stands between `lm_eval` and a model's server: its requests have deadlines, retries and checked replies, too.

The harness itself says "Server disconnected" whatever went wrong. Here the first error is kept, and what a request
leaves open is filled with values that change nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from nemo_lmpo.answers.completions import COMPLETIONS
from nemo_lmpo.answers.endpoint import Endpoint
from nemo_lmpo.answers.replies import ReplyError, check_echo, check_texts
from nemo_lmpo.answers.sampling import NEUTRAL
from nemo_lmpo.answers.workers import Failures
from nemo_lmpo.evaluate.local_server import TokenServer


class Relay(TokenServer):
    """Answers `/v1/completions` for a model's server.

    Args:
        endpoint: the server.
        left_out: neutral parameters that it refuses.
    """

    def __init__(self, endpoint: Endpoint, left_out: Collection[str]) -> None:
        super().__init__(f"/v1/{COMPLETIONS}")
        self.failures = Failures(0)
        self._endpoint = endpoint
        self._neutral = {name: value for name, value in NEUTRAL.items() if name not in left_out}

    def respond(self, body: dict[str, Any]) -> dict[str, Any]:
        """The server's reply.

        Raises:
            UserError: there is none; the harness ends with it, and :attr:`failures` tells afterwards.
        """
        try:
            return self._endpoint.post(
                COMPLETIONS, {**self._neutral, **body}, lambda reply: checked(reply, body), stop=self.failures.stop
            )
        except BaseException as error:
            self.failures.add(error)
            raise


def checked(reply: Any, body: dict[str, Any]) -> dict[str, Any]:
    """A reply that has what the harness reads.

    Raises:
        ReplyError: it has not.
    """
    prompt = body.get("prompt")
    prompts: list[Any] = (
        prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], list | str) else [prompt]
    )
    if body.get("echo"):
        check_echo(reply, prompts)
    else:
        check_texts(reply, len(prompts))
    if not isinstance(reply, dict):
        raise ReplyError("answers with something that is not an object")
    return reply
