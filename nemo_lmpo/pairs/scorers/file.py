"""Scores that exist already, in a file by the names of candidates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_lmpo.errors import DataError, shown
from nemo_lmpo.pairs.score import Keep, Missing
from nemo_lmpo.runtime.files import file_hash, read_lines


@dataclass(frozen=True)
class FileScorer:
    """Copies scores."""

    path: Path
    scores: Mapping[str, float]
    sha256: str

    def identity(self) -> Mapping[str, Any]:
        """The file's content."""
        return {"scores": self.sha256}

    def score(self, prompts: Missing, missing: set[str], keep: Keep) -> None:
        """Take those of the missing candidates.

        Raises:
            DataError: it leaves some out.
        """
        absent = [one.name for _, candidates in prompts for one in candidates if one.name not in self.scores]
        if absent:
            raise DataError(
                f"--scores {self.path} has no score for {len(absent)} answers, the first {absent[0]}; every line of "
                "work/samples.jsonl needs one, but for answers that are cut off, empty or repeated"
            )
        keep({name: self.scores[name] for _, them in prompts for one in them if (name := one.name) in missing})


def read_scores(path: Path) -> FileScorer:
    """Read JSON Lines with `id`, as in `work/samples.jsonl`, and `score`.

    Raises:
        DataError: no such file, or a line of another form; names it.
    """
    scores: dict[str, float] = {}
    for number, row in enumerate(read_lines(path), 1):
        name, score = row.get("id"), row.get("score")
        if not isinstance(name, str) or not isinstance(score, int | float) or isinstance(score, bool):
            raise DataError(
                f"--scores {path}, row {number} has not the form "
                f'{{"id": NAME, "score": NUMBER}}: {shown(row)}; `id` is as in work/samples.jsonl'
            )
        scores[name] = float(score)
    if not scores:
        raise DataError(f"--scores {path} holds no scores; write a line for each of work/samples.jsonl")
    return FileScorer(path, scores, file_hash(path))
