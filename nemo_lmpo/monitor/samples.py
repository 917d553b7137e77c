"""Answers that a run samples at validation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """The policy's answer to a validation prompt."""

    prompt: str
    """As the model sees it, special tokens included."""
    answer: str
    tokens: int
    """Of the answer, the one that ends it included."""
    finished: bool
    """Whether the policy ended it itself, and not `logging.sample_tokens`."""


def as_markdown(sample: Sample) -> str:
    """Prompt and answer as code blocks, which keep every letter and line."""
    end = "" if sample.finished else ", cut"
    blocks = (
        f"Prompt\n\n{_indented(sample.prompt)}",
        f"Answer ({sample.tokens} tokens{end})\n\n{_indented(sample.answer)}",
    )
    return "\n\n".join(blocks)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
