"""A generated task that needs nothing from outside: put letters into alphabetical order.

A prompt such as ``sort d a c`` has one right answer, ``a c d``; answers may be padded with filler words, as a
chatty model pads. Four sets share the prompts' form and the tokenizer (`builtin:tiny`):

- ``tiny``: chosen answers are right and short; of the rejected ones 40 % are right but padded, 30 % wrong and
  short, 30 % wrong and padded. A model must learn the task *and* to stop in order to tell them apart.
- ``tiny_long``: the length bias of real preference data. Chosen answers are right with 2 to 8 filler words; half of
  the rejected ones are right and half wrong, with 0 to 5 filler words. So longer is better more often than not, and
  a model that follows the pairs closely becomes wordy.
- ``tiny_sft``: the chosen answers are right and padded by an amount that depends on the prompt and on chance. A model
  fine-tuned on them gives answers of many lengths: a start model for comparisons.
- ``tiny_unpaired``: one answer a prompt with a label, in the form of TRL's unpaired sets; 60 % are a chosen answer of
  ``tiny``'s kind (true), the others a rejected one (false).

The prompts of the split ``test`` ask for letters that occur together in no training prompt of any of the sets.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nemo_lmpo.errors import DataError

LETTERS = "abcdefghijklmnopqrstuvwxyz"
FILLERS = ("well", "so", "indeed", "really", "very", "quite", "sure", "ok")
COMMAND = "sort"
MIN_LETTERS, MAX_LETTERS = 3, 8
SPLIT_SIZES = {"train": 4096, "test": 256}
_HELD_OUT_PART = 8  # one of so many letter sets is a test prompt


def right_answer(prompt: str) -> str:
    """The letters of a prompt (``sort d a c``) in alphabetical order (``a c d``)."""
    return " ".join(sorted(prompt.split()[1:]))


def is_right(prompt: str, response: str) -> bool:
    """Whether a response holds the right letters in the right order, filler words aside."""
    return " ".join(word for word in response.split() if word not in FILLERS) == right_answer(prompt)


def right_or_wrong(prompt: str, responses: Sequence[str]) -> list[float]:
    """1 for each right response and 0 for each wrong one, blind to length: a reward for `nemo-lmpo pairs`."""
    return [float(is_right(prompt, response)) for response in responses]


def _held_out(letters: list[str]) -> bool:
    """By the set of letters, so that no training prompt has the same answer as a test prompt."""
    digest = hashlib.sha256("".join(sorted(letters)).encode()).digest()
    return digest[0] % _HELD_OUT_PART == 0


def _wrong_letters(rng: random.Random, letters: list[str]) -> list[str]:
    """The right answer with one letter replaced, or in another order."""
    wrong = sorted(letters)
    if rng.random() < 0.5:
        others = [letter for letter in LETTERS if letter not in letters]
        wrong[rng.randrange(len(wrong))] = rng.choice(others)
        return wrong
    while wrong == sorted(letters):
        rng.shuffle(wrong)
    return wrong


def _answer(rng: random.Random, letters: list[str], fillers: int) -> str:
    return " ".join(letters + [rng.choice(FILLERS) for _ in range(fillers)])


def _tiny(rng: random.Random, letters: list[str]) -> tuple[str, str]:
    chosen = _answer(rng, sorted(letters), 0)
    kind = rng.random()
    fillers = rng.randint(2, 8)
    if kind < 0.4:
        return chosen, _answer(rng, sorted(letters), fillers)
    return chosen, _answer(rng, _wrong_letters(rng, letters), fillers if kind < 0.7 else 0)


def _tiny_long(rng: random.Random, letters: list[str]) -> tuple[str, str]:
    chosen = _answer(rng, sorted(letters), rng.randint(2, 8))
    while True:
        answer = sorted(letters) if rng.random() < 0.5 else _wrong_letters(rng, letters)
        rejected = _answer(rng, answer, rng.randint(0, 5))
        if rejected != chosen:
            return chosen, rejected


def _tiny_sft(rng: random.Random, letters: list[str]) -> tuple[str, str]:
    fillers = rng.randint(max(len(letters) - 5, 0), len(letters) - 1)
    chosen = _answer(rng, sorted(letters), fillers)
    return chosen, _answer(rng, _wrong_letters(rng, letters), rng.randint(0, MAX_LETTERS))


_TASKS: dict[str, Callable[[random.Random, list[str]], tuple[str, str]]] = {
    "tiny": _tiny,
    "tiny_long": _tiny_long,
    "tiny_sft": _tiny_sft,
    "tiny_unpaired": _tiny,
}
_DESIRABLE_PART = 0.6


def _prompts(rng: random.Random, split: str) -> Iterator[list[str]]:
    """Letters of ever new prompts of a split."""
    seen = set()
    while True:
        letters = rng.sample(LETTERS, rng.randint(MIN_LETTERS, MAX_LETTERS))
        if _held_out(letters) == (split == "test") and tuple(letters) not in seen:
            seen.add(tuple(letters))
            yield letters


def builtin_rows(name: str, split: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of a generated set, in UltraFeedback-binarized's schema or TRL's unpaired one; the same on every call.

    Args:
        name: what follows ``builtin:``: ``tiny``, ``tiny_long``, ``tiny_sft`` or ``tiny_unpaired``.
        split: ``train`` (4096 rows) or ``test`` (256 rows).
        limit: only the first so many.

    Raises:
        DataError: no such set or split.
    """
    if name not in _TASKS:
        raise DataError(f"there is no dataset 'builtin:{name}'; the builtin ones are: {', '.join(sorted(_TASKS))}")
    if split not in SPLIT_SIZES:
        raise DataError(f"builtin:{name} has no split '{split}'; its splits are: {', '.join(SPLIT_SIZES)}")
    rng = random.Random(f"{name}/{split}")
    rows = []
    for number, letters in zip(range(SPLIT_SIZES[split])[:limit], _prompts(rng, split), strict=False):
        user = {"role": "user", "content": " ".join([COMMAND, *letters])}
        chosen, rejected = ({"role": "assistant", "content": said} for said in _TASKS[name](rng, letters))
        row: dict[str, Any] = {"prompt_id": f"{name}-{split}-{number:04d}"}
        if name == "tiny_unpaired":
            label = rng.random() < _DESIRABLE_PART
            row |= {"prompt": [user], "completion": [chosen if label else rejected], "label": label}
        else:
            row |= {"prompt": user["content"], "chosen": [user, chosen], "rejected": [user, rejected]}
        rows.append(row)
    return rows
