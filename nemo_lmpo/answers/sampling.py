"""How tokens are chosen, in this process and in requests to servers. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from nemo_lmpo.errors import ConfigError

DEFAULT_NEW_TOKENS = 512
MAX_SEED = 2**63 - 1
MIN_TEMPERATURE = 1e-5
"""Of sampling: logits over less leave the range of float32."""
NEUTRAL = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "stream": False,
}
"""Values that change nothing, under the names of OpenAI, vLLM and llama.cpp. What a request does not name, servers fill
with values of their own: llama.cpp with top-k 40 and min-p 0.05, vLLM with a model's `generation_config.json`."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    max_new_tokens: int | None = None
    """None: `DEFAULT_NEW_TOKENS`, or as many as the model has positions for."""
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    seed: int = 42
    batch_size: int = 8

    def validate(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            ConfigError: naming the option.
        """
        for name, value in (("max-new-tokens", self.max_new_tokens), ("batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise ConfigError(f"--{name} {value} must be at least 1")
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature {self.temperature} must be 0 (greedy), or at least {MIN_TEMPERATURE}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"--seed {self.seed} must be from 0 to {MAX_SEED}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p} must be above 0 and at most 1")
        if self.top_k < 0:
            raise ConfigError(f"--top-k {self.top_k} must be 0 (all tokens) or more")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            raise ConfigError("--top-p and --top-k have no effect without --temperature; set it, for example to 0.7")


def named_in(text: str, names: Collection[str]) -> set[str]:
    """Which of some parameters a server's message is about."""
    return {name for name in names if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)}
