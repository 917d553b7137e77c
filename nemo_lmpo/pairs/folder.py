"""Names of the files of a pairs folder.

A pairs folder (``pairs/NAME``)::

    pairs.jsonl        the pairs (or pairs.parquet)
    pairs.json         models, seeds, rule, counts and versions; written last
    README.md          the data card, by which `datasets` finds the pairs in the folder
    report.html        the page; its pictures lie in figures/
    work/              what a command that resumes reads: settings and journals of each stage, hashes of weights
    .lock, .owner.json who works in it
"""

from __future__ import annotations

from pathlib import Path

from nemo_lmpo.data.read import PAIRS_SUMMARY

SUMMARY = PAIRS_SUMMARY
CARD, PAGE, FIGURES = "README.md", "report.html", "figures"
WORK = "work"
SAMPLES, SCORES, CALLS = "samples.jsonl", "scores.jsonl", "judge_calls.jsonl"
SAMPLE_SETTINGS, SCORE_SETTINGS = "sample_settings.json", "score_settings.json"
FORMATS = ("jsonl", "parquet")
STAYS_HERE = (f"{WORK}/*", ".*")
"""Patterns of what is not pushed to the hub."""


def pairs_file(folder: Path, form: str) -> Path:
    """Where the pairs lie."""
    return folder / f"pairs.{form}"


def is_begun(work: Path, *journals: str) -> bool:
    """Whether a stage has left rows."""
    paths = [work / name for name in journals]
    return any(path.is_file() and path.stat().st_size > 0 for path in paths)
