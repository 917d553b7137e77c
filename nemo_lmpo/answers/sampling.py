"""How tokens are chosen, in this process and in requests to servers. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from nemo_lmpo.errors import ConfigError, one_per_line
from nemo_lmpo.settings import options_out_of_bounds, setting

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

    max_new_tokens: int | None = setting(None, minimum=1)
    """None: `DEFAULT_NEW_TOKENS`, or as many as the model has positions for."""
    temperature: float = setting(0.0, minimum=0)
    """0: greedy."""
    top_p: float = setting(1.0, above=0, maximum=1)
    top_k: int = setting(0, minimum=0, remedy="0 takes all tokens")
    """0: all tokens."""
    seed: int = setting(42, minimum=0, maximum=MAX_SEED)
    batch_size: int = setting(8, minimum=1)

    def validate(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            ConfigError: naming each option, one per line.
        """
        problems = list(options_out_of_bounds(self))
        if 0 < self.temperature < MIN_TEMPERATURE:
            problems.append(f"--temperature {self.temperature} must be 0 (greedy), or at least {MIN_TEMPERATURE}")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            problems.append("--top-p and --top-k have no effect without --temperature; set it, for example to 0.7")
        if problems:
            raise ConfigError(one_per_line(problems))


def named_in(text: str, names: Collection[str]) -> set[str]:
    """Which of some parameters a server's message is about."""
    return {name for name in names if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)}
