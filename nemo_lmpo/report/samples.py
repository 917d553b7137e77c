"""Sampled answers for the page: the same prompts at every validation, side by side, and how long the answers get."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from nemo_lmpo.report.charts import Chart
from nemo_lmpo.report.plots import MUTED, ROLES, Picture, one_panel
from nemo_lmpo.report.read import Run
from nemo_lmpo.runtime import run_files

MOST_COLUMNS = 8
"""Validations that are shown side by side."""

CHART = Chart(
    "samples",
    "Length of sampled answers",
    "Tokens of the policy's greedy answers: a faint line per prompt, the strong one their mean. "
    "Rings: cut by the limit.",
    (),
)


@dataclass(frozen=True)
class SampleLine:
    """A line of `samples.jsonl`, which :mod:`nemo_lmpo.monitor.samples` describes."""

    step: int
    prompt: str
    text: str
    tokens: int
    finished: bool


@dataclass(frozen=True)
class SampledPrompt:
    """A prompt with its answers; None where it was not answered."""

    prompt: str
    answers: list[SampleLine | None]


@dataclass(frozen=True)
class Samples:
    """All answers of a run."""

    answers: list[SampleLine]

    @property
    def steps(self) -> list[int]:
        """When answers were taken; 0: before the first step."""
        return sorted({answer.step for answer in self.answers})

    @property
    def shown_steps(self) -> list[int]:
        """At most :data:`MOST_COLUMNS` of them, first and last included, evenly between."""
        steps = self.steps
        if len(steps) <= MOST_COLUMNS:
            return steps
        return [steps[round(place * (len(steps) - 1) / (MOST_COLUMNS - 1))] for place in range(MOST_COLUMNS)]

    @property
    def prompts(self) -> list[SampledPrompt]:
        """Each prompt with its answers at the shown steps, in the order in which prompts came."""
        found = {(answer.prompt, answer.step): answer for answer in self.answers}
        prompts = dict.fromkeys(answer.prompt for answer in self.answers)
        return [SampledPrompt(text, [found.get((text, step)) for step in self.shown_steps]) for text in prompts]


def read_samples(run_dir: Path) -> Samples | None:
    """The answers in `samples.jsonl`, broken lines left out; None if there are none."""
    try:
        lines = (run_dir / run_files.SAMPLES).read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return None
    answers = [answer for line in lines if (answer := _answer(line)) is not None]
    return Samples(answers) if answers else None


def _answer(line: str) -> SampleLine | None:
    try:
        entry = json.loads(line)
        answer = SampleLine(entry["step"], entry["prompt"], entry["answer"], entry["tokens"], entry["finished"])
    except (ValueError, KeyError, TypeError):
        return None
    kinds = ((answer.step, int), (answer.prompt, str), (answer.text, str), (answer.tokens, int))
    return answer if all(isinstance(value, kind) for value, kind in kinds) else None


def draw_samples(samples: Samples, run: Run) -> Picture:
    """Tokens of the answers over the steps, with the length of the chosen responses of validation."""
    chosen = run.metrics.get("val/lengths/chosen")
    level = None if chosen is None else (chosen.finite().values[-1], "chosen responses of validation")
    return Picture(CHART, one_panel("tokens per answer", lambda axes: _lines(axes, samples), level))


def _lines(axes: Any, samples: Samples) -> None:
    by_prompt: dict[str, list[SampleLine]] = {}
    for answer in samples.answers:
        by_prompt.setdefault(answer.prompt, []).append(answer)
    for answers in by_prompt.values():
        axes.plot(*_curve(answers), color=ROLES["neutral"], alpha=0.35, linewidth=0.9, zorder=2)
    cut = [answer for answer in samples.answers if not answer.finished]
    rings = {"markerfacecolor": "none", "markeredgecolor": MUTED, "markersize": 5.0}
    axes.plot(*_curve(cut), linestyle="none", marker="o", zorder=3, **rings)
    means = [fmean(answer.tokens for answer in samples.answers if answer.step == step) for step in samples.steps]
    marks = {"marker": "o", "markersize": 4.5}
    axes.plot(samples.steps, means, color=ROLES["margin"], linewidth=1.9, zorder=4, label="mean", **marks)


def _curve(answers: Sequence[SampleLine]) -> tuple[list[int], list[int]]:
    ordered = sorted(answers, key=lambda answer: answer.step)
    return [answer.step for answer in ordered], [answer.tokens for answer in ordered]
