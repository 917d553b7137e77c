"""AlpacaEval 2: judged and scored by the `alpaca_eval` package, in the scoring environment."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nemo_lmpo.answers.answer import Answer
from nemo_lmpo.answers.journal import Journal
from nemo_lmpo.answers.judge import JudgeServer
from nemo_lmpo.answers.replies import ChatReply
from nemo_lmpo.answers.workers import ItemError
from nemo_lmpo.errors import UserError
from nemo_lmpo.evaluate.bootstrap import SEED, Interval
from nemo_lmpo.evaluate.data_files import Instruction, df_gamed_file
from nemo_lmpo.evaluate.environment import NO_PROXY, run_program
from nemo_lmpo.evaluate.gateway import Gateway, answering_models
from nemo_lmpo.evaluate.result import BY_INSTRUCTION, Judge, Value

CALLS_FILE = "judge_calls.jsonl"
PROMPT_NAME = "alpaca_eval_clf (alpaca_eval 0.6)"
OUTPUT_TOKENS = 1


def check_logprobs(reply: ChatReply) -> None:
    """Refuse an answer without the most likely tokens, of which the preference is made.

    Raises:
        ItemError: there are none.
    """
    if not reply.top_tokens:
        raise ItemError(
            "the judge returns no top_logprobs, and AlpacaEval's preferences are made of them; choose a judge or "
            "server that does (vLLM does; reasoning models do not)"
        )


def judge(
    chosen: Sequence[Instruction], answers: Mapping[str, Answer], folder: Path, server: JudgeServer, *, quiet: bool
) -> tuple[dict[str, float | None], Judge]:
    """Preferences by instruction: 1 the baseline's answer, 2 the model's, None neither label.

    Raises:
        UserError: the judge cannot be asked; what it said is kept.
    """
    rows = [
        {"index": one.id, "instruction": one.text, "output_1": one.baseline_answer, "output_2": answers[one.id].text}
        for one in chosen
    ]
    with (
        Journal(folder / CALLS_FILE, "key") as journal,
        tqdm(total=len(rows), desc="judge", unit="call", disable=True if quiet else None) as bar,
        Gateway(server, journal, len(rows), check_logprobs, bar.update).open() as gateway,
        tempfile.TemporaryDirectory(prefix="nemo_lmpo_judge_") as scratch,
    ):
        config = Path(scratch) / "client.yaml"
        # The folder is this user's alone, so nobody else reads the token.
        config.write_text(f"default:\n- api_key: {gateway.token}\n  base_url: {gateway.base}\n")
        variables = {
            "OPENAI_CLIENT_CONFIG_PATH": str(config),
            "OPENAI_MAX_CONCURRENCY": str(server.endpoint.limits.concurrency),
            **NO_PROXY,
        }
        request = {"judge": server.name, "rows": rows, "folder": scratch}
        try:
            found = run_program("alpaca_judge", request, log=folder / "judge.log", environment=variables)
        except UserError:
            gateway.failures.raise_first()
            raise
        finally:
            gateway.failures.stop.set()
        gateway.failures.raise_first()
        preferences = {one.id: found[one.id] for one in chosen}
        refused, shown = len(gateway.refused), server.endpoint.shown
        return preferences, Judge(server.name, answering_models(journal), shown, PROMPT_NAME, refused, server.extra)


def score(
    chosen: Sequence[Instruction],
    answers: Mapping[str, Answer],
    preferences: Mapping[str, float | None],
    data: Path,
    rounds: int,
) -> tuple[dict[str, Value], dict[str, Any], dict[str, Any]]:
    """Values, details and numbers by instruction."""
    with tempfile.TemporaryDirectory() as scratch:
        model = {
            "index": [int(one.id) for one in chosen],
            "preferences": [preferences[one.id] for one in chosen],
            "lengths": [len(answers[one.id].text) for one in chosen],
            "baseline_lengths": [len(one.baseline_answer) for one in chosen],
        }
        request = {
            "df_gamed": str(df_gamed_file(data, Path(scratch))),
            "models": [model],
            "rounds": rounds,
            "seed": SEED,
        }
        found = run_program("alpaca_score", request)[0]
    units = {
        "ids": [one.id for one in chosen],
        "wins": [None if preferences[one.id] is None else 100 * (preferences[one.id] or 0) - 100 for one in chosen],
        "lengths": model["lengths"],
        "lc_replicates": found["lc_replicates"],
        "rounds": rounds,
        "seed": SEED,
    }
    metrics = found["metrics"]
    values = {
        "lc": Value(
            metrics["length_controlled_winrate"],
            metrics["lc_standard_error"],
            {BY_INSTRUCTION: Interval.of(np.array(found["lc_replicates"]))},
        ),
        "wr": Value.mean(np.array([win for win in units["wins"] if win is not None])),
        "length": Value.mean(np.array(units["lengths"], dtype=float)),
    }
    details = {"C": found["C"], "weights": found["weights"], "alpaca_eval": metrics}
    return values, details, units
