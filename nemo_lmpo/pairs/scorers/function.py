"""Scores by a Python function of the user's, for tasks whose answers a program can check."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_lmpo.errors import ConfigError, UserError, first_line, shown
from nemo_lmpo.pairs.candidate import AskedPrompt, Candidate
from nemo_lmpo.pairs.prompts import readable_row
from nemo_lmpo.pairs.score import Keep, Missing, with_missing
from nemo_lmpo.runtime.files import content_hash, file_hash

_ROW = "row"
"""A parameter of this name gets the prompt's whole row, such as a column with the right answer."""


@dataclass(frozen=True)
class FunctionScorer:
    """Calls ``function(prompt, answers)`` with a prompt and all its answers."""

    given: str
    function: Callable[..., Any]
    takes_row: bool
    file: Path | None
    """That it is written in."""
    rows_sha256: str
    """Of what it is given beside prompts."""

    def identity(self) -> Mapping[str, Any]:
        """Its name and its file's content."""
        code = None if self.file is None else file_hash(self.file)
        found = {"reward": self.given.rpartition("/")[2], "code": code}
        return {**found, "rows": self.rows_sha256} if self.takes_row else found

    def score(self, prompts: Missing, missing: set[str], keep: Keep) -> None:
        """A call for each prompt.

        Raises:
            UserError: it fails, or returns something else than a number for each answer.
        """
        for prompt, candidates in with_missing(prompts, missing):
            keep(dict(zip((one.name for one in candidates), self._call(prompt, candidates), strict=True)))

    def _call(self, prompt: AskedPrompt, candidates: Sequence[Candidate]) -> list[float]:
        more = {_ROW: dict(prompt.row)} if self.takes_row else {}
        try:
            found = self.function(prompt.given, [one.text for one in candidates], **more)
            scores = [float(one) for one in found]
        except Exception as error:  # whatever the user's code raises
            raise UserError(
                f"--reward {self.given} fails on prompt {prompt.id} ({type(error).__name__}: {first_line(error)}); "
                "correct it and run the same command again"
            ) from error
        if len(scores) != len(candidates):
            raise UserError(
                f"--reward {self.given} returns {len(scores)} scores for {len(candidates)} answers of prompt "
                f"{prompt.id}; return one number for each"
            )
        return scores


def open_function(given: str, prompts: Sequence[AskedPrompt]) -> FunctionScorer:
    """Find a function.

    Args:
        given: `MODULE:FUNCTION`, or `FILE.py:FUNCTION`.
        prompts: that will be scored.

    Raises:
        ConfigError: there is none.
    """
    place, colon, name = given.rpartition(":")
    if not colon or not name.isidentifier():
        raise ConfigError(f"--reward {shown(given)} is not MODULE:FUNCTION; give one, or FILE.py:FUNCTION")
    function = getattr(_module(place, given), name, None)
    if not callable(function):
        raise ConfigError(f"--reward {given}: {place} has no function {name}; correct the name")
    try:
        takes_row = _ROW in inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a builtin
        takes_row = False
    rows = content_hash([readable_row(prompt.row) for prompt in prompts]) if takes_row else ""
    try:
        file = inspect.getsourcefile(function)
    except TypeError:
        file = None
    return FunctionScorer(given, function, takes_row, None if file is None else Path(file), rows)


def _module(place: str, given: str) -> Any:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).expanduser()
        if not path.is_file():
            raise ConfigError(f"--reward {given}: {place} does not exist; give FILE.py:FUNCTION")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's module raises
        remedy = "" if place.endswith(".py") else "; name its file (FILE.py:FUNCTION), or put its folder on PYTHONPATH"
        raise ConfigError(
            f"--reward {given} cannot be imported ({type(error).__name__}: {first_line(error)}){remedy}"
        ) from error
