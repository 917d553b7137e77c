"""An OpenAI-compatible server for tests: completions of token ids, chat, log-probabilities, and faults on order.

As a model it continues token ids. As a judge it follows a stated rule that is blind to length: the answer with the
larger share of different words among its first twenty wins, the more clearly the larger the difference.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nemo_lmpo.evaluate.local_server import JsonHandler, serve

MODEL, ANSWERED_AS = "stub", "stub-2026-11"
_WORDS = 20


def quality(answer: str) -> float:
    """The judge's rule."""
    words = answer.split()[:_WORDS]
    return len(set(words)) / len(words) if words else 0.0


@dataclass
class Faults:
    """What shall go wrong."""

    down_after: int | None = None
    """Answer so many requests, then close connections."""
    busy: int = 0
    """Say 429 so often first."""
    extra_bos: bool = False
    no_logprobs: bool = False
    no_label: float = 0.0
    """Share of judgments with neither label."""
    strange_answers: bool = False
    empty: bool = False
    refuse: str = ""
    """Decline to judge prompts with this text."""


@dataclass
class Stub:
    """A running server."""

    url: str = ""
    faults: Faults = field(default_factory=Faults)
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    credentials: list[tuple[str | None, str]] = field(default_factory=list)
    """Header and query of each request."""
    refusal: str = ""
    """Answer 401 with this text."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, path: str) -> int:
        return sum(asked == path for asked, _ in self.requests)


def completion(stub: Stub, body: dict[str, Any]) -> dict[str, Any]:
    prompt = body["prompt"]
    prompts = prompt if prompt and isinstance(prompt[0], list) else [prompt]
    if body.get("echo"):
        return {
            "object": "text_completion",
            "model": ANSWERED_AS,
            "choices": [_echo(i, p) for i, p in enumerate(prompts)],
        }
    ids: Sequence[int] = prompts[0]
    words = [f"word{(sum(ids) + 7 * step) % (11 + len(ids) % 13)}" for step in range(5 + sum(ids) % 30)]
    text = "" if stub.faults.empty else " ".join(words)
    length = min(len(words), body["max_tokens"])
    return {
        "object": "text_completion",
        "model": ANSWERED_AS,
        "choices": [
            {"index": index, "text": text, "finish_reason": "length" if length < len(words) else "stop"}
            for index in range(len(prompts))
        ],
        "usage": {
            "prompt_tokens": len(ids) + stub.faults.extra_bos,
            "completion_tokens": length,
            "total_tokens": len(ids) + length,
        },
    }


def _echo(index: int, ids: Sequence[int]) -> dict[str, Any]:
    """Log-probabilities of the prompt itself and one token more, as a completions server echoes them."""
    logprobs: list[float | None] = [None, *(-1.0 - (token % 7) / 7 for token in ids[1:]), -1.0]
    top = [None, *({str(token): value} for token, value in zip(ids[1:], logprobs[1:], strict=False)), {"x": -1.0}]
    return {
        "index": index,
        "text": "",
        "logprobs": {"token_logprobs": logprobs, "tokens": [*map(str, ids), "x"], "top_logprobs": top},
    }


def chat(stub: Stub, body: dict[str, Any]) -> dict[str, Any]:
    text = body["messages"][-1]["content"]
    if stub.faults.refuse and stub.faults.refuse in text:
        message = {"role": "assistant", "content": None, "refusal": "I cannot help with that."}
        return {"model": ANSWERED_AS, "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
    neither = stub.faults.no_label and (len(text) % 100) / 100 < stub.faults.no_label
    choice: dict[str, Any]
    if body.get("logprobs"):
        first, second = re.findall(r'"output": """(.*?)"""', text, re.DOTALL)
        chance = 1 / (1 + math.exp(-6 * (quality(first) - quality(second))))
        top = {"x": -0.1, "y": -3.0} if neither else {"m": math.log(chance), "M": math.log1p(-chance)}
        tokens: list[dict[str, Any]] = [
            {"token": token, "logprob": value, "bytes": None} for token, value in top.items()
        ]
        best = max(tokens, key=lambda token: token["logprob"])
        choice = {"message": {"role": "assistant", "content": best["token"]}}
        if not stub.faults.no_logprobs:
            choice["logprobs"] = {"content": [{**best, "top_logprobs": tokens}]}
    else:
        first, second = re.findall(r"<\|The Start of Assistant \w's Answer\|>\n(.*?)\n<\|The End", text, re.DOTALL)
        difference = quality(first) - quality(second)
        size = 0 if abs(difference) < 0.02 else 1 if abs(difference) < 0.2 else 2
        verdict = "A=B" if size == 0 else "A" + ">" * size + "B" if difference > 0 else "B" + ">" * size + "A"
        content = "I cannot say." if neither else f"After my own answer: the verdict is [[{verdict}]]."
        choice = {"message": {"role": "assistant", "content": content}}
    choice.update(index=0, finish_reason="stop")
    usage = {"prompt_tokens": len(text) // 4, "completion_tokens": 1, "total_tokens": len(text) // 4 + 1}
    return {
        "id": "0",
        "created": 0,
        "object": "chat.completion",
        "model": ANSWERED_AS,
        "choices": [choice],
        "usage": usage,
    }


def _handler(stub: Stub) -> type[JsonHandler]:
    class Handler(JsonHandler):
        def parse_request(self) -> bool:
            fine = super().parse_request()
            if fine:
                self.path, _, query = self.path.partition("?")
                stub.credentials.append((self.headers.get("Authorization"), query))
            return fine

        def do_GET(self) -> None:
            self.send_json(200, {"data": [{"id": MODEL}]} if self.path.endswith("/models") else {})  # also /health

        def do_POST(self) -> None:
            body = json.loads(self.body())
            if stub.refusal:
                return self.send_json(401, {"error": {"message": stub.refusal}})
            with stub.lock:
                if stub.faults.busy > 0:
                    stub.faults.busy -= 1
                    return self.send_json(429, {"error": {"message": "too many"}})
                stub.requests.append((self.path, body))
                if stub.faults.down_after is not None and len(stub.requests) > stub.faults.down_after:
                    self.close_connection = True
                    return None
            if stub.faults.strange_answers:
                return self.send_json(200, {"answer": 42})
            return self.send_json(200, (chat if self.path.endswith("/chat/completions") else completion)(stub, body))

    return Handler


@contextmanager
def serving(port: int = 0) -> Iterator[Stub]:
    """A server in threads of this process."""
    stub = Stub()
    with serve(_handler(stub), port) as url:
        stub.url = f"{url}/v1"
        yield stub


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    with serving(parser.parse_known_args()[0].port) as running:  # a real one is also told the model and the host
        print(running.url, flush=True)
        threading.Event().wait()
