"""The second stage: a score for every candidate that can be in a pair, each in a journal as soon as it is there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from nemo_lmpo.answers.identity import claim_folder
from nemo_lmpo.answers.journal import Journal
from nemo_lmpo.errors import DataError
from nemo_lmpo.pairs import folder as files
from nemo_lmpo.pairs.candidate import Answered, AskedPrompt, Candidate

NOT_FINITE, REFUSED, NO_VERDICT = "not finite", "refused by the judge", "without a verdict"
"""Why a candidate has no score."""


class Keep:
    """Takes scores as they come, in any order and from any thread.

    Args:
        journal: where they go.
        progress: called with how many more are there.
    """

    def __init__(self, journal: Journal, progress: Callable[[int], object]) -> None:
        self._journal, self._progress = journal, progress

    def __call__(self, scores: Mapping[str, float | None], why: str = "") -> None:
        """Keep scores by the names of candidates; None: there is none, and ``why``."""
        rows = []
        for name, score in scores.items():
            finite = score is not None and math.isfinite(score)
            reason = {} if finite else {"why": why if score is None else NOT_FINITE}
            rows.append({"id": name, "score": score if finite else None, **reason})
        if rows:
            self._journal.extend(rows)
            self._progress(len(rows))


Missing = Sequence[tuple[AskedPrompt, Sequence[Candidate]]]


class Scorer(Protocol):
    """Who scores."""

    def identity(self) -> Mapping[str, Any]:
        """What decides the scores of given answers."""

    def score(self, prompts: Missing, missing: set[str], keep: Keep) -> None:
        """Score candidates.

        Args:
            prompts: each with all its candidates that can be in a pair, two or more.
            missing: names of those that have no score yet.
            keep: takes scores; those of others than the missing are wasted work, but no error.
        """


def collect_scores(answered: Sequence[Answered], scorer: Scorer, work: Path, *, quiet: bool) -> list[Answered]:
    """The same prompts with scores; those of an earlier command are taken as they are.

    Raises:
        ConfigError: the folder holds scores of another scorer.
        DataError: not one candidate has a finite score.
        UserError: the scorer cannot score; what it scored is kept.
    """
    begun = files.is_begun(work, files.SCORES, files.CALLS)
    remedy = f"choose another --output, or remove {files.SCORES} and {files.CALLS} there to score these answers anew"
    claim_folder(work, files.SCORE_SETTINGS, scorer.identity(), "scores", begun=begun, remedy=remedy)
    candidates = [(one.prompt, usable) for one in answered if len(usable := one.usable()) > 1]
    with Journal(work / files.SCORES, "id") as journal:
        names = [candidate.name for _, usable in candidates for candidate in usable]
        missing = {name for name in names if name not in journal.rows}
        done, hidden = len(names) - len(missing), True if quiet else None
        with tqdm(total=len(names), initial=done, desc="score", unit="answer", disable=hidden) as bar:
            if missing:
                scorer.score(candidates, missing, Keep(journal, bar.update))
        scores = {name: journal.rows[name]["score"] for name in names}
        reasons = {str(journal.rows[name].get("why")) for name in names} if names else set()
    if names and all(score is None for score in scores.values()):
        raise DataError(
            f"{work / files.SCORES}: none of {len(names)} answers has a score ({', '.join(sorted(reasons))}); correct "
            "the scorer, remove that file, and run the same command again"
        )
    return [
        replace(one, candidates=[replace(each, score=scores.get(each.name)) for each in one.candidates])
        for one in answered
    ]


def with_missing(prompts: Missing, missing: set[str]) -> Missing:
    """Those prompts of which a candidate has no score yet."""
    return [one for one in prompts if any(candidate.name in missing for candidate in one[1])]
