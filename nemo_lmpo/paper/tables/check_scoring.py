"""`evaluate check`: recompute published rows from published judgments. Proves the scoring on this machine."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_lmpo.errors import DataError
from nemo_lmpo.evaluate.data_files import (
    BASELINES,
    MissingFileError,
    arena_answers,
    df_gamed_file,
    find_file,
    load_set,
    published_scores,
    read_table,
)
from nemo_lmpo.evaluate.environment import run_program
from nemo_lmpo.evaluate.suites import ALPACA_EVAL, ARENA_HARD

EXACT, LC_EXACT = 1e-6, 1e-5
"""In points. LC must be the published one at the chosen C, or at another of those that cross-validation chooses from:
with a substitute of `df_gamed.csv` it may choose a neighbour."""
PAPER_ROWS = ("Mistral-7B-Instruct-v0.2", "Llama-3-Instruct-8B-SimPO", "Meta-Llama-3-8B-Instruct")
"""Models of the paper's Table 1 that the public leaderboard has."""


@dataclass(frozen=True)
class CheckedRow:
    """One line: a number computed here beside the published one."""

    kind: str
    name: str
    values: tuple[tuple[str, float, float, float], ...]
    """What, computed here, published, tolerance."""
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether every number agrees within its tolerance."""
        return all(abs(here - there) <= tolerance for _, here, there, tolerance in self.values)

    def line(self) -> str:
        """For a terminal."""
        shown = "  ".join(f"{what} {here:.4f} ({there:.4f})" for what, here, there, _ in self.values)
        state = "ok    " if self.passed else "DIFFERS"
        return f"{state} {self.kind:<12} {self.name:<34} {shown}{f'  {self.note}' if self.note else ''}"


def alpaca_models(folder: Path) -> list[dict[str, Any]]:
    """Stored judgments of leaderboard models as the scoring program takes them."""
    rows = read_table(find_file(folder, "alpaca_eval2_preferences_and_lengths.csv"))
    names = [column.removeprefix("pref:") for column in rows[0] if column.startswith("pref:")]
    baseline = [int(row[f"len:{BASELINES[ALPACA_EVAL]}"]) for row in rows]
    return [
        {
            "name": name,
            "index": [int(row["index"]) for row in rows],
            "preferences": [float(text) if (text := row[f"pref:{name}"]) else None for row in rows],
            "lengths": [int(row[f"len:{name}"]) for row in rows],
            "baseline_lengths": baseline,
        }
        for name in names
    ]


def check_alpaca_eval(folder: Path) -> list[CheckedRow]:
    """WR, LC and length of every stored model by `alpaca_eval`'s own function."""
    load_set(ALPACA_EVAL, folder)
    models = alpaca_models(folder)
    published = [published_scores(ALPACA_EVAL, folder, model["name"]) for model in models]
    with tempfile.TemporaryDirectory() as scratch:
        asked = [{**model, "published": there["lc"]} for model, there in zip(models, published, strict=True)]
        request = {"df_gamed": str(df_gamed_file(folder, Path(scratch))), "models": asked, "tolerance": LC_EXACT}
        scored = run_program("alpaca_score", request)
    rows = []
    for model, there, found in zip(models, published, scored, strict=True):
        metrics = found["metrics"]
        chosen = metrics["length_controlled_winrate"]
        nearest, lc = min(found["lc_by_C"], key=lambda pair: abs(pair[1] - there["lc"]))
        values = (
            ("WR", metrics["win_rate"], there["wr"], EXACT),
            ("LC", lc, there["lc"], LC_EXACT),
            ("length", float(int(statistics.fmean(model["lengths"]))), there["length"], 0.0),
        )
        note = f"C {nearest:.3g}"
        if abs(chosen - there["lc"]) > LC_EXACT:
            note += f"; cross-validation chose {found['C']:.3g} here: LC {chosen:.4f}"
        rows.append(CheckedRow("AlpacaEval 2", model["name"], values, note))
    return rows


def check_paper_rows(folder: Path) -> list[CheckedRow]:
    """LC of models of the paper from published GLM weights and difficulties: mean sigmoid(w_base + w_diff d)."""
    # Published in a file of its own, and in df_gamed.csv, twice per instruction.
    table = read_table(find_file(folder, "alpaca_eval2_instruction_difficulty.csv", "alpaca_eval2_df_gamed.csv"))
    difficulty = {row["index"]: float(row["instruction_difficulty"]) for row in table}.values()
    weights = {row[""]: row for row in read_table(find_file(folder, "alpaca_eval2_glm_weights.csv"))}
    rows = []
    for name in PAPER_ROWS:
        base = float(weights[name]["not_gamed_baseline.astype(float)"])
        slope = float(weights[name]["instruction_difficulty"])
        lc = 100 * statistics.fmean(1 / (1 + math.exp(-(base + slope * value))) for value in difficulty)
        published = published_scores(ALPACA_EVAL, folder, name)
        rows.append(CheckedRow("GLM weights", name, (("LC", lc, published["lc"], LC_EXACT),)))
    return rows


def check_arena_hard(folder: Path) -> list[CheckedRow]:
    """Lengths in tokens of the stored answers beside those published; the sets' hashes are checked on the way."""
    load_set(ARENA_HARD, folder)
    rows = []
    for name in (BASELINES[ARENA_HARD], "gpt-3.5-turbo-0125"):
        answers = arena_answers(find_file(folder, f"arena_hard_v0.1_{name}.jsonl"))
        counts = run_program("count_tokens", {"texts": list(answers.values())})
        published = published_scores(ARENA_HARD, folder, name)["length"]
        # The leaderboard cuts the mean's decimals.
        rows.append(CheckedRow("Arena-Hard", name, (("tokens", float(int(statistics.fmean(counts))), published, 0.0),)))
    return rows


def check(folder: Path, say: Callable[[str], object]) -> Sequence[CheckedRow]:
    """All checks that the folder has data for; lines go to ``say`` as they come.

    Raises:
        DataError: something is damaged, or there is nothing to check.
    """
    found: list[CheckedRow] = []
    for part in (check_alpaca_eval, check_paper_rows, check_arena_hard):
        try:
            rows = part(folder)
        except MissingFileError as error:
            say(f"left out: {error}")
            continue
        for row in rows:
            say(row.line())
        found += rows
    if not found:
        raise DataError(f"{folder} holds nothing to check; run python -m nemo_lmpo.evaluate fetch --data {folder}")
    return found
