"""Runs that somebody trained, side by side: grouped by their settings, runs of one group being its seeds."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_lmpo.errors import ConfigError, counted, shown
from nemo_lmpo.paper.comparison.figures import average
from nemo_lmpo.paper.comparison.identity import NO_IDENTITY, identity
from nemo_lmpo.paper.comparison.results import Estimate, Values, estimate, judge, of_variant
from nemo_lmpo.paper.comparison.suites import Claim, Variant
from nemo_lmpo.paper.verdicts import CONTRADICTED, NO_DIFFERENCE, NOT_MEASURED, SHOWN
from nemo_lmpo.report.blocks import Block, Code, Figure, Heading, Table, Text, to_html, to_markdown
from nemo_lmpo.report.plots import draw_all
from nemo_lmpo.report.read import VALIDATION, Run, read_run
from nemo_lmpo.report.summary import leaves, setting
from nemo_lmpo.runtime.files import replace_file

_WHOLE_RUN = ("pairs_per_second", "conversations_per_second", "answers_per_second", "tokens_per_second")
_COUNTERS = ("step", "epoch", "consumed_pairs")
_WORDS = {SHOWN: "higher", CONTRADICTED: "lower", NO_DIFFERENCE: "equal", NOT_MEASURED: "no common seed"}


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only."""

    variant: Variant
    runs: Mapping[int, Run]
    """By seed."""
    places: Mapping[int, Path]

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings of its runs, the seed aside."""
        return next(iter(self.runs.values())).config


def read_groups(directories: Sequence[Path]) -> list[Group]:
    """Runs by their settings, in the order in which they are given.

    Raises:
        ConfigError: fewer than two runs, or one is named twice, or two have the same settings and seed.
        UserError: one is no run that has finished a step.
    """
    if len(directories) < 2:
        raise ConfigError(f"{directories[0]} is one run; give two or more to compare")
    groups: dict[str, list[tuple[int, Run, Path]]] = {}
    for directory in directories:
        run = read_run(directory)
        seed = setting(run.config, "model.seed")
        seed = seed if isinstance(seed, int) else 0
        same = groups.setdefault(identity(run.config), [])
        if twin := next((place for other, _, place in same if other == seed), None):
            raise ConfigError(f"{directory} has the settings and the seed of {twin}; leave one out")
        same.append((seed, run, directory))
    names = Counter(group[0][1].label for group in groups.values())
    found = []
    for members in groups.values():
        _, first, place = members[0]
        label = first.label if names[first.label] == 1 else f"{first.label} ({place})"
        runs = {seed: run for seed, run, _ in sorted(members, key=lambda one: one[0])}
        found.append(Group(Variant(label, label), runs, {seed: directory for seed, _, directory in members}))
    return found


def measured(groups: Sequence[Group]) -> Values:
    """The last validation of each run, peak memory, and the median speed."""
    return {(group.variant, seed): dict(_numbers(run)) for group in groups for seed, run in group.runs.items()}


def _numbers(run: Run) -> Iterator[tuple[str, float]]:
    for name in run.metrics.series:
        found = run.metrics.get(name)
        if found is None or name.removeprefix(VALIDATION) in _COUNTERS:
            continue
        if name in _WHOLE_RUN:
            yield name, statistics.median(found.finite().values)
        elif name.startswith(VALIDATION) or name == "memory/peak":
            yield name, found.finite().values[-1]


def write_own_page(directories: Sequence[Path], output: Path, command: str) -> Path:
    """Write `comparison.html`, `comparison.md` and `figures/` about runs; returns the first.

    Raises:
        ConfigError, UserError: see :func:`read_groups`.
    """
    groups = read_groups(directories)
    pictures = draw_all(
        [average(group.variant.label, [run.metrics for run in group.runs.values()]) for group in groups]
    )
    title = f"Comparison of {counted(len(directories), 'run')}"
    figures = [Figure(one.chart.title, one.chart.caption, one.png, f"figures/{one.chart.name}.png") for one in pictures]
    blocks = [Heading(1, title), *_about(groups), Code(command), *_tables(groups), Heading(2, "Curves"), *figures]
    (output / "figures").mkdir(parents=True, exist_ok=True)
    for one in pictures:
        replace_file(output / "figures" / f"{one.chart.name}.png", one.png)
    replace_file(output / "comparison.md", to_markdown(blocks))
    page = output / "comparison.html"
    replace_file(page, to_html(title, blocks))
    return page


def _about(groups: Sequence[Group]) -> list[Text]:
    first = groups[0].variant.label
    lines = [
        "Runs with the same settings are seeds of one column: numbers are means ± standard errors over them.",
        f"Differences are from {first}, seed by seed. One is higher or lower if its 95 % confidence interval, by "
        "Student's t, does not hold zero; with one seed nothing is decided. Many differences are looked at, so one in "
        "twenty would come out by chance.",
    ]
    for section, what in (("data.validation", "held-out data"), ("model.restore_from_path", "start model")):
        values = {json.dumps(setting(group.config, section), default=str, sort_keys=True) for group in groups}
        if len(values) > 1:
            lines.append(f"The runs do not have the same {what}, so numbers may differ for that reason alone.")
    lines += [
        f"{group.places[seed]} is not finished: it is at step {run.metrics.last_step} of {run.total_steps}."
        for group in groups
        for seed, run in group.runs.items()
        if run.finished is False
    ]
    return [Text(line) for line in lines]


def _tables(groups: Sequence[Group]) -> list[Block]:
    values = measured(groups)
    found = dict.fromkeys(name for numbers in values.values() for name in numbers)  # in the order of the log
    names = sorted(found, key=lambda name: name in _WHOLE_RUN)
    variants = [group.variant for group in groups]
    numbers = [
        [name, *(_text(estimate(list(of_variant(values, one, name).values()))) for one in variants)] for name in names
    ]
    compared = [_difference(name, variants[0], other, values) for other in variants[1:] for name in names]
    return [
        Heading(2, "Last validation"),
        Table(("metric", *(one.label for one in variants)), numbers),
        Heading(2, f"Differences from {variants[0].label}"),
        Table(("", "metric", "difference", "verdict"), [row for row in compared if row], style="claims"),
        Heading(2, "What differs"),
        Table(("setting", *(one.label for one in variants)), _settings(groups), style="settings"),
        Heading(2, "Runs"),
        Table(
            ("", "seed", "steps", "directory"),
            [
                [group.variant.label, str(seed), str(run.metrics.last_step), str(group.places[seed])]
                for group in groups
                for seed, run in group.runs.items()
            ],
            style="texts",
        ),
    ]


def _difference(name: str, base: Variant, other: Variant, values: Values) -> list[str] | None:
    judgement = judge(Claim(name, "", name, other, base), values)
    if not (of_variant(values, base, name) and of_variant(values, other, name)):
        return None
    return [other.label, name, _text(judgement.difference), _WORDS.get(judgement.verdict, judgement.verdict)]


def _settings(groups: Sequence[Group]) -> list[list[str]]:
    """Settings that not all groups have alike."""
    tables = [dict(leaf for key, value in group.config.items() for leaf in leaves(key, value)) for group in groups]
    rows = []
    for key in dict.fromkeys(key for table in tables for key in table):
        if key.partition(".")[0] in NO_IDENTITY or key == "model.seed":
            continue
        cells = [str(table.get(key, "-")) for table in tables]
        if len(set(cells)) > 1:
            rows.append([key, *(shown(cell) if len(cell) > 60 else cell for cell in cells)])
    return rows


def _text(found: Estimate | None) -> str:
    if found is None:
        return "-"
    return f"{found.mean:.4g}" if found.error is None else f"{found.mean:.4g} ± {found.error:.2g}"
