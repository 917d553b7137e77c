"""Arena-Hard v0.1: two games a question against gpt-4-0314, judged over HTTP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nemo_lmpo.answers.endpoint import Endpoint, for_each
from nemo_lmpo.answers.journal import Journal
from nemo_lmpo.errors import UserError
from nemo_lmpo.evaluate.answers import Answer
from nemo_lmpo.evaluate.battles import collect_battles, parse_verdict
from nemo_lmpo.evaluate.data_files import Instruction, JudgePrompt
from nemo_lmpo.evaluate.environment import run_program
from nemo_lmpo.evaluate.result import BY_BATTLE, BY_INSTRUCTION, Judge, Value

JUDGMENTS_FILE = "judgments.jsonl"
GAMES = (1, 2)
OUTPUT_TOKENS = 4096
"""Most of a judgment, as released; a typical one has about 600."""
TYPICAL_OUTPUT_TOKENS = 600
ATTEMPTS = 2
"""As released: a judgment without a verdict is asked for once more."""


def judge(
    chosen: Sequence[Instruction],
    answers: Mapping[str, Answer],
    folder: Path,
    endpoint: Endpoint,
    name: str,
    prompt: JudgePrompt,
    *,
    quiet: bool,
) -> tuple[dict[str, list[str | None]], Judge]:
    """Verdicts by question, one a game; None where the judge gave none.

    Raises:
        UserError: the judge cannot be asked; what it said is kept.
    """
    with Journal(folder / JUDGMENTS_FILE, "game") as journal:
        games = [(one, game) for one in chosen for game in GAMES]
        missing = [(one, game) for one, game in games if _key(one, game) not in journal.rows]
        total, done = len(games), len(games) - len(missing)
        with tqdm(total=total, initial=done, desc="judge", unit="call", disable=True if quiet else None) as bar:

            def play(item: tuple[Instruction, int]) -> None:
                one, game = item
                made = judgment(endpoint, name, prompt, one, answers[one.id].output, game)
                journal.append({"game": _key(one, game), **made})
                bar.update(1)

            for_each(missing, play, endpoint.limits.concurrency)
        verdicts = {one.id: [journal.rows[_key(one, game)]["verdict"] for game in GAMES] for one in chosen}
        answered = Counter(str(journal.rows[_key(one, game)]["model"]) for one, game in games)
    return verdicts, Judge(name, dict(answered), endpoint.shown, prompt.sha256)


def _key(one: Instruction, game: int) -> str:
    return f"{one.id}/{game}"


def judgment(
    endpoint: Endpoint, name: str, prompt: JudgePrompt, one: Instruction, output: str, game: int
) -> dict[str, Any]:
    """One judgment, asked for again if it has no verdict. In the first game the baseline's answer is A.

    Raises:
        UserError: an answer in no known form.
    """
    first, second = (one.baseline_answer, output) if game == 1 else (output, one.baseline_answer)
    body: dict[str, Any] = {"model": name, "messages": prompt.messages(one.text, first, second)}
    body |= {"temperature": 0, "max_tokens": OUTPUT_TOKENS}
    found: dict[str, Any] = {}
    for attempt in range(1, ATTEMPTS + 1):
        response = endpoint.post("chat/completions", body)
        try:
            text = response["choices"][0]["message"]["content"] or ""
        except (KeyError, IndexError, TypeError):
            raise UserError(
                "the judge answers without choices[0].message.content; it must serve chat/completions"
            ) from None
        found = {
            "verdict": parse_verdict(text),
            "model": response.get("model", "not said"),
            "attempts": attempt,
            "judgment": text,
        }
        if found["verdict"] is not None:
            break
    return found


def score(
    chosen: Sequence[Instruction], answers: Mapping[str, Answer], verdicts: Mapping[str, Sequence[str | None]]
) -> tuple[dict[str, Value], dict[str, Any], dict[str, Any]]:
    """Values, details and numbers by question."""
    battles = collect_battles(verdicts)
    means, weights = battles.by_question()
    tokens = run_program("count_tokens", {"texts": [answers[one.id].output for one in chosen]})
    values = {
        "wr": Value(
            battles.win_rate,
            float(battles.replicates().std(ddof=1)),
            {BY_INSTRUCTION: battles.question_interval(), BY_BATTLE: battles.published_interval()},
        ),
        "length": Value.mean(np.array(tokens, dtype=float)),
    }
    units = {
        "ids": battles.ids,
        "wins": [float(100 * value) for value in means],
        "weights": [float(value) for value in weights],
        "lengths": tokens,
    }
    counts = Counter(str(verdict) for games in verdicts.values() for verdict in games)
    return values, {"verdicts": dict(sorted(counts.items()))}, units
