"""Numbers of each round: what its policy's answers are like, and what its training came to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from nemo_lmpo.pairs import folder as files
from nemo_lmpo.report.read import VALIDATION, read_metrics
from nemo_lmpo.rounds.plan import NUMBERS, Rounds
from nemo_lmpo.runtime import run_files
from nemo_lmpo.runtime.files import read_json, read_lines, write_json

_FROM_TRAINING = {
    "accuracy": "rewards/accuracies",
    "logps_chosen": "logps/chosen",
    "logps_rejected": "logps/rejected",
}


def write_numbers(rounds: Rounds, upto: int) -> list[dict[str, Any]]:
    """Write `rounds.json`: a row for each policy that has answered, the start model's first.

    Args:
        rounds: all of them.
        upto: rounds that are there; one more than there are: the last policy has answered, too.
    """
    rows = []
    for number in range(1, upto + 1):
        row: dict[str, Any] = {"round": number - 1, **answers_of(rounds.pairs_dir(number))}
        summary = rounds.pairs_dir(number) / files.SUMMARY
        if summary.is_file():
            found = read_json(summary)
            row |= {"pairs": found["counts"]["pairs"], "longer_wins": found["statistics"]["longer_wins_pairs"]}
        rows.append(row)
    for row in rows[1:]:
        row |= training_of(rounds.run_dir(row["round"]))
    write_json(rounds.folder / NUMBERS, rows)
    return rows


def answers_of(pairs: Path) -> dict[str, Any]:
    """Mean reward and length of all sampled answers.

    Of equal answers to a prompt one is scored, and the others count with its score. Answers that are cut off or empty,
    and those to prompts with one answer only, have none.
    """
    samples, scores = (
        {row["id"]: row for row in read_lines(pairs / files.WORK / name)} for name in (files.SAMPLES, files.SCORES)
    )
    known = {_text(name, samples): row["score"] for name, row in scores.items() if row["score"] is not None}
    rewards = [
        known[_text(name, samples)]
        for name, row in samples.items()
        if not row["truncated"] and _text(name, samples) in known
    ]
    lengths = [row["tokens"] for row in samples.values() if row["tokens"] is not None]
    return {
        "reward": fmean(rewards) if rewards else None,
        "tokens": fmean(lengths) if lengths else None,
        "cut_off": 100 * fmean(bool(row["truncated"]) for row in samples.values()),
    }


def _text(name: str, samples: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """What tells one answer of a prompt from another."""
    return name.rpartition("/")[0], str(samples[name]["output"]).strip()


def training_of(run_dir: Path) -> dict[str, Any]:
    """The last validation of a training, or its last step where it validates nothing."""
    metrics = read_metrics(run_dir / run_files.METRICS)
    found = {}
    for name, metric in _FROM_TRAINING.items():
        series = metrics.get(VALIDATION + metric) or metrics.get(metric)
        values = series.finite().values if series is not None else []
        found[name] = values[-1] if values else None
    return found
