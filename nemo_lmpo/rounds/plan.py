"""What each round does: the commands for its pairs and its training, and the folders they work in.

A rounds folder::

    settings.json      what decides the pairs of every round
    training.json      what decides the trainings
    round_1/pairs/     a pairs folder of the start model's answers
    round_1/run/       the run directory of the training on them
    round_2/ ...       the same from round_1's policy
    last/              answers of the last policy with their scores, for the page
    rounds.json        numbers of each round
    rounds.html        the page; its picture is rounds.png
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FIRST, PREVIOUS = "first", "previous"
SETTINGS, TRAINING = "settings.json", "training.json"
NUMBERS, PAGE, PICTURE, LAST = "rounds.json", "rounds.html", "rounds.png", "last"


@dataclass(frozen=True)
class Rounds:
    """All rounds."""

    folder: Path
    count: int
    recipe: Sequence[str]
    """`--config-name`, `--config-dir`, and the user's overrides."""
    start: str
    """The first model."""
    pair_words: Sequence[str]
    """Options of `pairs` but for model and output."""
    deciding_words: Sequence[str]
    """Those of them that decide the pairs."""
    needs_reference: bool
    reference: str = FIRST

    def policy_before(self, number: int) -> str:
        """The model that a round samples from and trains on; rounds count from 1."""
        return self.start if number == 1 else str(self.run_dir(number - 1))

    def pairs_dir(self, number: int) -> Path:
        """Of a round; one behind the last: where the last policy's answers are."""
        return self.folder / LAST if number > self.count else self.folder / f"round_{number}" / "pairs"

    def run_dir(self, number: int) -> Path:
        """Of a round's training."""
        return self.folder / f"round_{number}" / "run"

    def pairs_arguments(self, number: int) -> list[str]:
        """For `nemo-lmpo pairs`."""
        until = ["--until", "score"] if number > self.count else []
        where = ["--model", self.policy_before(number), "--output", str(self.pairs_dir(number))]
        return [*where, *self.pair_words, *until]

    def train_arguments(self, number: int) -> list[str]:
        """For `nemo-lmpo train`."""
        settings = [
            f"model.restore_from_path={self.policy_before(number)}",
            f"data.train.path={self.pairs_dir(number)}",
            f"run_dir={self.run_dir(number)}",
        ]
        if self.needs_reference and self.reference == FIRST and number > 1:
            settings.append(f"model.reference_from_path={self.start}")
        return [*self.recipe, *settings]
