"""`result.json`: one suite's numbers of one model, with everything that one must know to compare them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from nemo_lmpo.errors import DataError
from nemo_lmpo.evaluate.bootstrap import Interval, weighted_means
from nemo_lmpo.runtime.files import read_json, write_json

RESULT_FILE, UNITS_FILE, SETTINGS_FILE = "result.json", "units.json", "settings.json"
FORMAT = 1


@dataclass(frozen=True)
class Value:
    """A number with its errors, each by the method that gave it."""

    value: float
    standard_error: float | None = None
    intervals: Mapping[str, Interval] = field(default_factory=dict)

    @property
    def bootstrap_interval(self) -> Interval | None:
        """The interval of resampling instructions."""
        return self.intervals.get(BY_INSTRUCTION)

    @classmethod
    def mean(cls, values: np.ndarray, *, stream: int = 0) -> Value:
        """Mean over instructions; no standard error of a single one."""
        error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
        interval = Interval.of(weighted_means(values, stream=stream))
        return cls(float(values.mean()), error, {BY_INSTRUCTION: interval})


BY_INSTRUCTION = "bootstrap over instructions, 95 %"
BY_BATTLE = "bootstrap over battles, 95 % (as published)"


@dataclass(frozen=True)
class Model:
    """What was evaluated, and which row of the paper it stands for."""

    name: str
    given: str
    """As on the command line."""
    kind: str
    """run, checkpoint, nemo, huggingface, answers, anchor."""
    setting: str | None = None
    method: str | None = None
    variant: str | None = None
    """A row of Table 2 or 3, such as `cube function` or `lambda 0.05`."""
    weights_sha256: str | None = None
    template_sha256: str | None = None
    tokenizer_sha256: str | None = None
    published: Mapping[str, float] = field(default_factory=dict)
    """An anchor's numbers on the public leaderboard, judged by gpt-4-1106-preview."""


@dataclass(frozen=True)
class Judge:
    """Who judged."""

    asked: str
    answered: Mapping[str, int]
    """How many answers came from each model, by the name it answered with."""
    endpoint: str
    prompt: str
    """Name or hash of what it was told."""
    refused: int = 0
    """Calls that it declined to answer; they are among those without a verdict."""
    request: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of its requests that are not the suite's."""

    @property
    def identity(self) -> tuple[str, tuple[str, ...], str, str]:
        """Results with equal identities may be compared."""
        return (self.asked, tuple(sorted(self.answered)), self.prompt, json.dumps(self.request, sort_keys=True))


@dataclass(frozen=True, kw_only=True)
class Result:
    """All that `result.json` holds."""

    suite: str
    model: Model
    values: Mapping[str, Value]
    n: int
    """Instructions that the numbers rest on."""
    of: int
    """Instructions in the set."""
    unparsed: int = 0
    truncated: int = 0
    empty: int = 0
    judge: Judge | None = None
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    generation: Mapping[str, Any]
    packages: Mapping[str, str]
    evaluation_set: Mapping[str, str]
    command: str
    details: Mapping[str, Any] = field(default_factory=dict)
    """What belongs to one suite only, such as AlpacaEval's C."""
    folder: Path | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing of the set was left out."""
        return self.n == self.of


def write_result(folder: Path, result: Result, units: Mapping[str, Any]) -> None:
    """Write the numbers by instruction, then the result: where it is, everything is."""
    write_json(folder / UNITS_FILE, units)
    content = {name: value for name, value in asdict(result).items() if name != "folder"}
    write_json(folder / RESULT_FILE, {"format": FORMAT, **content})


def relabel(folder: Path, model: Model) -> None:
    """Give a finished result another name or row of the paper; the numbers stay."""
    before = read_result(folder)
    if before.model != model:
        write_result(folder, replace(before, model=model), read_units(before))


_NEEDED = [one.name for one in fields(Result) if one.name not in ("details", "folder")]


def read_result(folder: Path) -> Result:
    """Read a result.

    Raises:
        DataError: it is missing, damaged, or without something that comparing needs; names it.
    """
    path = folder / RESULT_FILE
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no result; repeat its command")
    missing = [name for name in _NEEDED if name not in content]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}, without which numbers cannot be compared; make it again")
    if content.get("format") != FORMAT:
        raise DataError(f"{path} has format {content.get('format')}, this version reads {FORMAT}; make it again")
    try:
        values = {
            name: Value(one["value"], one["standard_error"], {k: Interval(*v) for k, v in one["intervals"].items()})
            for name, one in content["values"].items()
        }
        judge = Judge(**content["judge"]) if content["judge"] is not None else None
        rest = {name: content[name] for name in _NEEDED if name not in ("values", "judge", "model")}
        return Result(
            **rest,
            model=Model(**content["model"]),
            values=values,
            judge=judge,
            details=content.get("details", {}),
            folder=folder,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}); repeat its command") from None


def read_units(result: Result) -> dict[str, Any]:
    """Numbers by instruction of a result that was read."""
    assert result.folder is not None
    units: dict[str, Any] = read_json(result.folder / UNITS_FILE)
    return units
