"""Plain English: the phrases that the field does not use stay out of what users and newcomers read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_lmpo.errors import counted

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("nemo_lmpo", "docs", "conversion", "recipes", "slurm")
ENDINGS = {".py", ".md", ".sh", ".sbatch", ".yaml", ".j2", ".example"}

_AMOUNT = r"(?:pairs|tokens|GPUs|bytes|requests|lines?|objects?|files?|rows|kernels|threads?|processes|\bonce|\btwice)"
_THING = r"(?:step|second|node|rank|replica|process|layer|micro-batch|parameter|GPU|device|minute|hour|run|cluster)"
_VERB = r"(?:that|which|of|in|would|uses|holds|takes|stands|has|begins|needs|is|was|group)"
PATTERNS = {
    r"(?<!there )(?<!There )\b(?:is|are) no (?:directory|file|list|JSON|recipe|URL|model|size|interpreter|part|whole|"
    r"number|numbers|metric|metrics|object|SentencePiece|matrix|tensor|mapping|judge|answer|UTF-8)\b": "is not a ...",
    r"\bthat (?:is|are) none\b": "invalid ...",
    r"\b[Rr]epeat the command\b": "run the same command to resume / again",
    r"\bgo(?:es)? on where\b": "resumes",
    r"\bas if it had been told\b|\bWhat a run is told\b": "run configuration",
    r"\blikeliest\b": "most likely",
    r"\bmost tokens\b": "maximum number of tokens",
    rf"\b{_AMOUNT} an? {_THING}\b(?! {_VERB}\b)": "... per ...",
    r"\} an? (?:process|replica|rank|node)\b": "{number} per ...",
    r"[a-z]\(e?s\)": "1 file, 2 files (nemo_lmpo.errors.counted)",
    r"\b(?:doomed|grave|pairs_a_copy|bytes_a_parameter|give_back)\b": "expired, trash, ..._per_..., restore",
    r"\ban honest\b|\bthe honest one\b": "bootstrap interval",
    r"\bstopped; \w+ the command\b": "interrupted: run the same command to resume",
}
"""What is not to be written, and what to write instead."""


def texts() -> Iterator[Path]:
    yield from (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md")
    for folder in FOLDERS:
        yield from (path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in ENDINGS and path.is_file())


@pytest.mark.parametrize("pattern", PATTERNS, ids=PATTERNS.values())
def test_phrases_stay_out(pattern: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in texts()
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
        if re.search(pattern, line)
    ]
    assert not found, f"write: {PATTERNS[pattern]}\n" + "\n".join(found)


def test_the_patterns_find_what_they_are_for() -> None:
    wrong = (
        *("runs/x is no directory; give one", "names the line that is none", "stop it and repeat the command"),
        *("it goes on where it was", "the likeliest tokens", "most tokens of an answer", "128 pairs a step, one epoch"),
        *("one file a rank", "once a step over the global batch", "stopped; repeat the command to go on"),
        *("{size} a process", "lacks 2 data file(s)", "8 process(es)"),
    )
    for text in wrong:
        assert any(re.search(pattern, text) for pattern in PATTERNS), text
    right = ("there is no GPU", "is no longer served", "the pairs of a step", "threads a process group starts")
    for text in right:
        assert not any(re.search(pattern, text) for pattern in PATTERNS), text


@pytest.mark.parametrize(
    ("number", "noun", "said"),
    [(1, "process", "1 process"), (2, "process", "2 processes"), (0, "data file", "0 data files")],
)
def test_a_number_stands_with_its_noun(number: int, noun: str, said: str) -> None:
    assert counted(number, noun) == said
