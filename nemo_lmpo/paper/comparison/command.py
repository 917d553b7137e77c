"""The command `nemo-lmpo compare`: rerun a comparison of the paper, or lay one's own runs side by side."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_lmpo.errors import ConfigError, TrainingError, without_secrets
from nemo_lmpo.paper.comparison.scales import SCALES, Scale, find_scale
from nemo_lmpo.paper.comparison.suites import SUITES, Suite, Variant
from nemo_lmpo.runtime.command import RESUME
from nemo_lmpo.runtime.environment import prepare_environment

if TYPE_CHECKING:
    from nemo_lmpo.paper.comparison.runs import RunPlan

_logger = logging.getLogger("nemo_lmpo")


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train what a figure or table of the paper compares, or a suite of your own, under the same data "
        "order and budget, and write one page with what came out. The same command resumes; finished runs are not "
        "repeated. With directories of runs instead of --suite: the page about these runs.",
        epilog="Overrides hold for every run, for example model.restore_from_path=DIR data.train.path=pairs.jsonl.",
    )
    known = ", ".join(SUITES)
    suites = f"{known}, all, or a YAML file of your own; repeatable"
    parser.add_argument("--suite", action="append", default=[], metavar="SUITE", help=suites)
    parser.add_argument("--scale", default="tiny", metavar="SCALE", help=f"{', '.join(SCALES)} (default: tiny)")
    parser.add_argument("--seeds", type=int, metavar="N", help="orders of the data (default: the scale's)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="page and runs (default: comparisons/SCALE)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--list", action="store_true", help="print the runs as commands and exit")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    either = "settings of every run of a suite, or directories of runs"
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE|RUN", help=either)
    parser.set_defaults(run=_run, when_interrupted=RESUME)
    return parser


def find_suites(names: Sequence[str]) -> list[Suite]:
    """Suites by name or file, `all` for every one of the paper, each once.

    Raises:
        ConfigError: an unknown name, or a file that is no suite.
    """
    found: dict[str, Suite] = {}
    for name in names:
        if name == "all":
            found |= SUITES
        elif name.endswith((".yaml", ".yml")):
            from nemo_lmpo.paper.comparison.suite_file import read_suite

            found[name] = read_suite(Path(name))
        elif name in SUITES:
            found[name] = SUITES[name]
        else:
            raise ConfigError(f"--suite {name} is unknown; choose {', '.join(SUITES)}, all, or give a YAML file")
    return list(found.values())


def _run(options: argparse.Namespace) -> int:
    prepare_environment()  # before anything imports torch; runs inherit it
    if not options.suite:
        return _own_runs(options)
    suites, scale = find_suites(options.suite), find_scale(options.scale)
    seeds = scale.seeds if options.seeds is None else options.seeds
    for name, value in (("--seeds", seeds), ("--jobs", options.jobs)):
        if value < 1:
            raise ConfigError(f"{name} {value} must be at least 1")
    output = options.output or Path("comparisons") / scale.name
    from nemo_lmpo.paper.comparison.runs import plan_runs, start_run

    start = start_run(scale, output / "runs")
    start_model = start.start_model if start is not None else None
    plans = plan_runs(suites, scale, output / "runs", seeds=seeds, start_model=start_model, extra=options.overrides)
    if options.list:
        for line in commands(start, unique(plans), scale):
            sys.stdout.write(f"{shlex.join(map(without_secrets, line))}\n")
        return 0
    failed = _train_all(start, plans, scale, options)
    page = _write(suites, scale, seeds, plans, output, options.command_line)
    _logger.info("page: %s", page)
    if failed:
        raise TrainingError(f"{len(failed)} runs failed, the first with {failed[0].directory / 'train.log'}; see there")
    return 0


def _own_runs(options: argparse.Namespace) -> int:
    settings = [given for given in options.overrides if "=" in given and not Path(given).is_dir()]
    if settings or not options.overrides:
        raise ConfigError("give --suite with a comparison to train, or the directories of two or more runs")
    from nemo_lmpo.paper.comparison.own_runs import write_own_page

    output = options.output or Path("comparisons") / "runs"
    _logger.info("page: %s", write_own_page([Path(given) for given in options.overrides], output, options.command_line))
    return 0


def commands(start: RunPlan | None, plans: Sequence[RunPlan], scale: Scale) -> list[list[str]]:
    """What a shell can run, line by line, to train what the comparison trains."""

    def train(plan: RunPlan) -> list[str]:
        if scale.separate:
            return ["torchrun", *plan.torchrun_arguments()]
        return ["python", "-m", "nemo_lmpo.train", *plan.arguments()]

    lines = [train(plan) for plan in plans]
    if start is None:
        return lines
    export = ["python", "-m", "nemo_lmpo.export", str(start.directory), "--output", str(start.start_model)]
    return [train(start), export, *lines]


def _train_all(
    start: RunPlan | None, plans: Mapping[tuple[Variant, int], RunPlan], scale: Scale, options: argparse.Namespace
) -> list[RunPlan]:
    from nemo_lmpo.paper.comparison.execute import execute, make_start_model

    if start is not None and not all(plan.finished for plan in plans.values()):
        make_start_model(start, scale, quiet=options.quiet)
    return execute(unique(plans), scale, jobs=options.jobs, quiet=options.quiet)


def unique(plans: Mapping[tuple[Variant, int], RunPlan]) -> list[RunPlan]:
    """One plan a directory: variants that come to the same settings share their runs."""
    found: dict[Path, RunPlan] = {}
    for plan in plans.values():
        found.setdefault(plan.directory, plan)
    return list(found.values())


def _write(
    suites: Sequence[Suite],
    scale: Scale,
    seeds: int,
    plans: Mapping[tuple[Variant, int], RunPlan],
    output: Path,
    command_line: str,
) -> Path:
    from nemo_lmpo.paper.comparison.page import Comparison, write_page
    from nemo_lmpo.paper.comparison.runs import MEASURED_FILE
    from nemo_lmpo.report.read import read_facts, read_metrics

    found = {key: read_facts(plan.directory / MEASURED_FILE) for key, plan in plans.items()}
    measured = {key: result for key, result in found.items() if result}
    examples: dict[Variant, Sequence[Mapping[str, str]]] = {}
    for (variant, _), result in measured.items():
        if result["examples"]:
            examples.setdefault(variant, result["examples"])
    comparison = Comparison(
        scale,
        suites,
        seeds,
        command_line,
        {key: result["values"] for key, result in measured.items()},
        {key: read_metrics(plans[key].directory / "metrics.jsonl") for key in measured},
        {who: without_secrets(" ".join((plan.recipe, *plan.overrides))) for (who, _), plan in plans.items()},
        examples,
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPU cores",
        [f"{variant.label} (seed {seed})" for variant, seed in plans if (variant, seed) not in measured],
    )
    return write_page(comparison, output)
