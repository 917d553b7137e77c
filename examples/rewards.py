"""Rewards for `pairs_of_its_own.sh`: a function takes a prompt and its answers and returns a number for each."""

from __future__ import annotations

from collections.abc import Sequence


def letters_in_order(prompt: str, answers: Sequence[str]) -> list[float]:
    """For the generated task `builtin:tiny`: how many of the letters asked for stand at their place, by alphabet."""
    letters = sorted(word for word in str(prompt).split() if len(word) == 1)
    return [float(sum(a == b for a, b in zip(answer.split(), letters, strict=False))) for answer in answers]


def short_and_finished(prompt: str, answers: Sequence[str]) -> list[float]:
    """For any model: a whole sentence is wanted, and rather a short one."""
    return [float(answer.rstrip().endswith((".", "!", "?"))) - len(answer) / 1000 for answer in answers]
