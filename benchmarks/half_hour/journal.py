"""What has been run already, kept beside its output, so that a half-hour that was cut off goes on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_lmpo.runtime.files import read_json, write_json

MOST_ATTEMPTS = 2
"""A piece that never ends, or ends the machine, must not stand before all others for ever."""
CUT_OFF = -1
"""The status of a piece that was begun so often and never ended."""


@dataclass(frozen=True)
class Outcome:
    """How a piece ended."""

    status: int
    seconds: float

    @property
    def words(self) -> str:
        """For the page."""
        if self.status == CUT_OFF:
            return f"cut off {MOST_ATTEMPTS} times"
        return f"status {self.status} after {self.seconds:.0f} s"


class Journal:
    """How often each piece was begun, and how it ended; written anew, as a whole, at each change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        kept: dict[str, Any] = read_json(path) if path.exists() else {"begun": {}, "ended": {}}
        self.begun: dict[str, int] = kept["begun"]
        self.outcomes = {piece: Outcome(**ended) for piece, ended in kept["ended"].items()}
        """Of the pieces that are done with."""

    def begin(self, piece: str) -> bool:
        """Note that a piece is about to run; False: it was cut off too often already, and that is its outcome."""
        if self.begun.get(piece, 0) >= MOST_ATTEMPTS:
            self.end(piece, Outcome(CUT_OFF, 0.0))
            return False
        self.begun[piece] = self.begun.get(piece, 0) + 1
        self._write()
        return True

    def end(self, piece: str, outcome: Outcome) -> None:
        """Note how it ended."""
        self.outcomes[piece] = outcome
        self._write()

    def _write(self) -> None:
        ended = {piece: dataclasses.asdict(outcome) for piece, outcome in self.outcomes.items()}
        write_json(self.path, {"begun": self.begun, "ended": ended})
