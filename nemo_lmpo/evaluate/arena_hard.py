"""Arena-Hard v0.1: two games a question against gpt-4-0314, judged over HTTP."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nemo_lmpo.answers.answer import Answer
from nemo_lmpo.answers.journal import Journal
from nemo_lmpo.answers.judge import JudgeServer
from nemo_lmpo.answers.workers import for_each
from nemo_lmpo.evaluate.battles import collect_battles, parse_verdict
from nemo_lmpo.evaluate.data_files import Instruction, JudgePrompt
from nemo_lmpo.evaluate.environment import run_program
from nemo_lmpo.evaluate.result import BY_BATTLE, BY_INSTRUCTION, Judge, Value

JUDGMENTS_FILE = "judgments.jsonl"
GAMES = (1, 2)
OUTPUT_TOKENS = 4096
"""Maximum of a judgment, as released; a typical one has about 600. Judges that think first need more."""
TYPICAL_OUTPUT_TOKENS = 600
ATTEMPTS = 2
"""As released: a judgment without a verdict is asked for once more."""


def judge(
    chosen: Sequence[Instruction],
    answers: Mapping[str, Answer],
    folder: Path,
    server: JudgeServer,
    prompt: JudgePrompt,
    *,
    max_tokens: int = OUTPUT_TOKENS,
    quiet: bool,
) -> tuple[dict[str, list[str | None]], Judge]:
    """Verdicts by question, one per game; None where the judge gave none.

    Raises:
        UserError: the judge cannot be asked; what it said is kept.
    """
    with Journal(folder / JUDGMENTS_FILE, "game") as journal:
        games = [(one, game) for one in chosen for game in GAMES]
        missing = [(one, game) for one, game in games if _key(one, game) not in journal.rows]
        total, done = len(games), len(games) - len(missing)
        with tqdm(total=total, initial=done, desc="judge", unit="call", disable=True if quiet else None) as bar:

            def play(item: tuple[Instruction, int], stop: threading.Event) -> None:
                one, game = item
                made = judgment(server, request(server, prompt, one, answers[one.id].text, game, max_tokens), stop)
                journal.append({"game": _key(one, game), **made})
                bar.update(1)

            for_each(missing, play, server.endpoint.limits.concurrency)
        rows = [journal.rows[_key(one, game)] for one, game in games]
        verdicts = {one.id: [journal.rows[_key(one, game)]["verdict"] for game in GAMES] for one in chosen}
    refused = [row for row in rows if row.get("refused")]
    answered = Counter(str(row["model"]) for row in rows if not row.get("refused"))
    asked = {**({} if max_tokens == OUTPUT_TOKENS else {"max_tokens": max_tokens}), **server.extra}
    shown = server.endpoint.shown
    return verdicts, Judge(server.name, dict(answered), shown, prompt.sha256, len(refused), asked)


def _key(one: Instruction, game: int) -> str:
    return f"{one.id}/{game}"


def request(
    server: JudgeServer, prompt: JudgePrompt, one: Instruction, output: str, game: int, max_tokens: int
) -> dict[str, Any]:
    """What the judge is asked. In the first game the baseline's answer is A."""
    first, second = (one.baseline_answer, output) if game == 1 else (output, one.baseline_answer)
    messages = prompt.messages(one.text, first, second)
    return {"model": server.name, "messages": messages, "temperature": 0, "max_tokens": max_tokens}


def judgment(server: JudgeServer, body: Mapping[str, Any], stop: threading.Event) -> dict[str, Any]:
    """One judgment, asked for again if it has no verdict, but not if the judge declines.

    Raises:
        UserError: there is none.
    """
    found: dict[str, Any] = {}
    for attempt in range(1, ATTEMPTS + 1):
        reply = server.ask(body, stop).reply
        said = reply.text or ""
        found = {
            "verdict": None if reply.refusal else parse_verdict(said),
            "model": reply.model,
            "attempts": attempt,
            "judgment": said,
            "finish_reason": reply.finish_reason,
            "refused": reply.refusal,
        }
        if found["verdict"] is not None or reply.refusal:
            break
    return found


def score(
    chosen: Sequence[Instruction], answers: Mapping[str, Answer], verdicts: Mapping[str, Sequence[str | None]]
) -> tuple[dict[str, Value], dict[str, Any], dict[str, Any]]:
    """Values, details and numbers by question."""
    battles = collect_battles(verdicts)
    means, weights = battles.by_question()
    tokens = run_program("count_tokens", {"texts": [answers[one.id].text for one in chosen]})
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
