"""What a judge is asked, and what of its reply is a verdict."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_lmpo.answers.replies import ChatReply
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.pairs.candidate import AskedPrompt
from nemo_lmpo.pairs.scorers.conversation import prompt_text
from nemo_lmpo.runtime.files import content_hash, read_small

POINTWISE, PAIRWISE = "pointwise", "pairwise"
LOWEST, HIGHEST = 1, 9
"""Grades that a judge gives: digits, so that each is one token."""
_TOP_TOKENS = 20
_VERDICT_TOKENS = 1024

_GRADE = """Please rate how well the answer below serves the person who wrote the prompt. Look at whether it is \
correct, helpful, complete and to the point. Its length by itself is neither a merit nor a fault.

[Prompt]
{prompt}

[Answer]
{answer}

[End]

Reply with one digit and nothing else: a grade from 1 (useless) to 9 (excellent)."""

_COMPARE = """Please compare two answers to the prompt below. Look at which is more correct, helpful, complete and to \
the point. Neither their order nor their length by itself is a merit.

[Prompt]
{prompt}

[Answer A]
{answer_a}

[Answer B]
{answer_b}

[End]

Explain in a few sentences. Then end with your verdict on a line of its own: [[A]] if answer A is better, [[B]] if \
answer B is better, [[C]] if they are equally good."""

_FIELDS = {POINTWISE: ("{prompt}", "{answer}"), PAIRWISE: ("{prompt}", "{answer_a}", "{answer_b}")}
_VERDICT = re.compile(r"\[\[([ABC])\]\]")
SHARE = {"A": 1.0, "C": 0.5, "B": 0.0}
"""What the first answer has of a game."""


@dataclass(frozen=True)
class JudgePrompt:
    """A text with fields for the prompt and its answers."""

    mode: str
    text: str

    @property
    def sha256(self) -> str:
        """Of the text."""
        return content_hash(self.text)

    def request(self, model: str, prompt: AskedPrompt, *answers: str) -> dict[str, Any]:
        """To `/v1/chat/completions`, about one answer or two."""
        values = (prompt_text(prompt), *answers)
        fields = dict(zip(_FIELDS[self.mode], values, strict=True))
        said = re.sub("|".join(map(re.escape, fields)), lambda found: fields[found[0]], self.text)
        request = {"model": model, "messages": [{"role": "user", "content": said}], "temperature": 0}
        if self.mode == POINTWISE:
            return {**request, "max_tokens": 1, "logprobs": True, "top_logprobs": _TOP_TOKENS}
        return {**request, "max_tokens": _VERDICT_TOKENS}


def judge_prompt(mode: str, path: Path | None) -> JudgePrompt:
    """The built-in prompt of a mode, or the user's own.

    Raises:
        ConfigError: the file cannot be read, or lacks a field.
    """
    if path is None:
        return JudgePrompt(mode, _GRADE if mode == POINTWISE else _COMPARE)
    try:
        text = read_small(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"--judge-prompt {path} cannot be read ({reason}); give a text file") from None
    absent = [name for name in _FIELDS[mode] if name not in text]
    if absent:
        raise ConfigError(f"--judge-prompt {path} lacks {absent[0]}; a {mode} prompt has {', '.join(_FIELDS[mode])}")
    return JudgePrompt(mode, text)


def grade(reply: ChatReply) -> float | None:
    """The grade that the first token's probabilities expect; None where no digit is among the likely tokens.

    Tokens that mean the same digit (with a blank before it, say) count together, and all digits together as one.
    """
    weights: dict[int, float] = {}
    for one in reply.top_tokens:
        token = one.token.strip()
        if token.isascii() and token.isdigit() and LOWEST <= int(token) <= HIGHEST:
            weights[int(token)] = weights.get(int(token), 0.0) + math.exp(one.logprob)
    total = sum(weights.values())
    return sum(digit * weight for digit, weight in weights.items()) / total if total > 0 else None


def verdict(reply: ChatReply) -> str | None:
    """`A`, `B` or `C` (a tie): the last that the judge writes; None where it writes none."""
    found = _VERDICT.findall(reply.text or "")
    return found[-1] if found else None


def games_won(games: Mapping[tuple[str, str], str | None]) -> dict[str, float | None]:
    """The share of its games that each candidate won, ties as halves; None for one without a judged game.

    Args:
        games: verdicts by the names of first and second answer.
    """
    won: dict[str, list[float]] = {name: [] for pair in games for name in pair}
    for (first, second), found in games.items():
        if found is not None:
            won[first].append(SHARE[found])
            won[second].append(1.0 - SHARE[found])
    return {name: sum(shares) / len(shares) if shares else None for name, shares in won.items()}
