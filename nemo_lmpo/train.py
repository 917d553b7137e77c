"""The commands `train`, `check`, `plan` and `trace`: ``nemo-lmpo train --config-name lmpo_tiny [key=value ...]``.

Kept light: help, unknown recipes and settings that are wrong, the loss's options included, answer before torch is
imported, and everything else that is refused without asking a GPU before megatron-core is.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_lmpo.config.mode import Mode, split_mode
from nemo_lmpo.errors import TrainingError, UserError
from nemo_lmpo.monitor.observer import any_failed
from nemo_lmpo.monitor.watchdog import go_on, watched
from nemo_lmpo.runtime import run_files
from nemo_lmpo.runtime.batch_job import OUTCOME_DONE, OUTCOME_REFUSED, leave_outcome, stopped
from nemo_lmpo.runtime.command import RESUME, answer, leave_out_working_directory, run_parser
from nemo_lmpo.runtime.environment import order_kernels, prepare_environment
from nemo_lmpo.runtime.launch import several_ranks

if TYPE_CHECKING:
    from nemo_lmpo.config.schema import Config
    from nemo_lmpo.runtime.launch import LaunchInfo

_logger = logging.getLogger("nemo_lmpo")

_SAID_BY_THE_BANNER = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
)
"""Starts of megatron-core's warnings on import: kernels that are not there, and a default of its own."""


def train_parser(prog: str) -> argparse.ArgumentParser:
    """`nemo-lmpo train`."""
    parser = _parser(
        prog,
        "Train a policy on preference pairs.",
        "Overrides are Hydra's: model.tensor_model_parallel_size=2 loss.lam=1.0 data.train.path=pairs.jsonl. "
        "The same command resumes. With torchrun or srun it runs over several processes.",
        Mode(),
    )
    parser.add_argument("--list", action="store_true", help="list the recipes and exit")
    parser.add_argument("--show-config", action="store_true", help="print the resolved configuration and exit")
    return parser


def check_parser(prog: str) -> argparse.ArgumentParser:
    """`nemo-lmpo check`: the same as `train` with `dry_run=true`."""
    about = "Validate a run without starting it: settings, data and model on this machine, layout, and expected memory."
    return _parser(prog, about, "Takes what `train` takes.", Mode(dry_run=True))


def plan_parser(prog: str) -> argparse.ArgumentParser:
    """`nemo-lmpo plan`: the same as `train` with `dry_run=plan`."""
    parser = _parser(
        prog,
        "Rank the layouts of a run that fit a number of GPUs, fastest first.",
        "Takes what `train` takes.",
        Mode(dry_run="plan"),
    )
    parser.add_argument(
        "--gpus", metavar="GPUS", help="4, 64xH100, or 16x4xA100 as nodes x GPUs x card (default: the recipe's)"
    )
    return parser


def trace_parser(prog: str) -> argparse.ArgumentParser:
    """`nemo-lmpo trace`: the same as `train` with `dry_run=trace`."""
    about = "Run one step of the busiest ranks on fake tensors: memory, kernels, and communication of the real program."
    return _parser(prog, about, "Takes what `train` takes.", Mode(dry_run="trace"))


def _parser(prog: str, about: str, epilog: str, mode: Mode) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=about, epilog=epilog)
    recipe = parser.add_argument(
        *("--config-name", "--config"),
        metavar="RECIPE",
        help="a recipe of the package or of --config-dir, or the path of one (own/mine.yaml)",
    )
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder with recipes of your own")
    overrides = parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that differ from the recipe; a first word without = is the recipe",
    )
    recipe.completer = _complete_recipe  # type: ignore[attr-defined]  # argcomplete's way
    overrides.completer = _complete_setting  # type: ignore[attr-defined]
    parser.set_defaults(
        run=_run_command,
        leave=_leave_at_once,
        own_signals=True,
        when_interrupted=RESUME,
        mode=mode,
        gpus=None,
        list=False,
        show_config=False,
    )
    return parser


def _complete_recipe(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    from nemo_lmpo.config.recipe import recipe_names

    return list(recipe_names(parsed_args.config_dir))


def _complete_setting(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    from nemo_lmpo.config.schema import all_keys

    recipes = [] if parsed_args.config_name else _complete_recipe(prefix, parsed_args)
    return [*recipes, *(f"{key}=" for key in all_keys())]


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m nemo_lmpo.train`; returns the exit status."""
    if arguments is None:
        leave_out_working_directory()
    return run_parser(train_parser("python -m nemo_lmpo.train"), arguments)


def _run_command(options: argparse.Namespace) -> int:
    started = time.time()
    try:
        given = [] if options.gpus is None else [f"GPUS={options.gpus}"]
        mode, options.overrides = split_mode([*options.overrides, *given], options.mode)
        options.traceback = options.traceback or mode.traceback
        return _run(options, mode, started)
    except (UserError, TrainingError):
        leave_outcome(OUTCOME_REFUSED)
        raise


def _leave_at_once(status: int) -> int:
    """The exit status.

    One of several ranks does not return, as leaving in order would wait for the others; nor does a process whose
    tracker hangs, as it would wait for that.
    """
    if any_failed() or several_ranks():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _run(options: argparse.Namespace, mode: Mode, started: float) -> int:
    from nemo_lmpo.runtime.launch import read_launch_info

    prepare_environment()
    launch = read_launch_info()
    _start_logging(launch)
    from nemo_lmpo.config.recipe import config_as_dict, load_recipe, recipe_names
    from nemo_lmpo.errors import ConfigError

    if options.list:
        answer("\n".join(recipe_names(options.config_dir)))
        return 0
    if options.config_name is None and options.overrides and "=" not in options.overrides[0]:
        options.config_name, *options.overrides = options.overrides
    if options.config_name is None:
        raise ConfigError("no recipe is given; name one (`nemo-lmpo train --list` shows them)")
    if not options.show_config:
        _logger.info("reading recipe %s", options.config_name)
    config = load_recipe(options.config_name, options.overrides, config_dir=options.config_dir)
    _order_kernels(config)
    if options.show_config:
        import yaml

        print(yaml.safe_dump(config_as_dict(config), sort_keys=False), end="")  # noqa: T201
        return 0
    return _dry_run(config, mode) if mode.dry_run else _train(config, launch, started)


def _order_kernels(config: Config) -> None:
    """Before CUDA starts."""
    from nemo_lmpo.runtime.nvml import oldest_architecture

    model = config.model
    known = order_kernels(
        fsdp=model.fsdp,
        splits_layers=model.tensor_model_parallel_size > 1 or model.context_parallel_size > 1,
        architecture=None if config.trainer.accelerator == "cpu" else oldest_architecture(),
    )
    if known is not None:
        _logger.warning(known)


def _train(config: Config, launch: LaunchInfo, started: float) -> int:
    from nemo_lmpo import training
    from nemo_lmpo.checkpoint.run_directory import RunDirectory

    result = training.run(config, launch, started=started)
    if not launch.is_main:
        return 0
    if result.stopped_by is None:
        leave_outcome(OUTCOME_DONE)
        run = RunDirectory(config)
        why = f" (no better {config.checkpoint.monitor} for a while)" if result.early else ""
        _logger.info("done: %d steps%s; checkpoints in %s", result.step, why, run.checkpoints)
        if config.checkpoint.export_hf:
            _export(run.path, config)
    else:
        leave_outcome(stopped(result.stopped_by))
        if result.step == 0:
            _logger.info("stopped by %s before the first step; nothing to save yet", result.stopped_by)
        else:
            what = "stopped by %s after step %d, saved; run the same command to resume"
            _logger.info(what, result.stopped_by, result.step)
    return 0


def _export(run: Path, config: Config) -> None:
    from nemo_lmpo.export.write import export_run

    with watched("the export", config.trainer.step_timeout):
        exported = export_run(run, run / run_files.HUGGINGFACE, overwrite=True, progress=lambda name: go_on())
    _logger.info("exported: %s", exported)


def _dry_run(config: Config, mode: Mode) -> int:
    if mode.dry_run == "plan":
        return _plan(config, mode.GPUS)
    from nemo_lmpo.training.preflight import preflight

    checked = preflight(config, config.trainer.devices * config.trainer.num_nodes, fetch=False)
    if mode.dry_run == "trace":
        from nemo_lmpo.trace.describe import describe_trace

        answer(describe_trace(checked.layout))
        return 0
    from nemo_lmpo.sizing.describe_run import describe

    answer(describe(checked.layout, unseen=checked.unseen, rows=checked.rows))
    return 0


def _plan(config: Config, gpus: str | None) -> int:
    """Layouts for a number of GPUs; which of them are valid is the answer, so only settings are checked before."""
    from nemo_lmpo.config.rules import check_settings
    from nemo_lmpo.sizing.cards import read_gpus
    from nemo_lmpo.sizing.describe_plan import describe_plan
    from nemo_lmpo.training.start_model import find_start_model

    check_settings(config)
    base = find_start_model(config.model, fetch=False)
    machine = read_gpus(gpus or f"{config.trainer.num_nodes}x{config.trainer.devices}xA100")
    answer(describe_plan(config, base.architecture, machine))
    return 0


def _start_logging(launch: LaunchInfo) -> None:
    """The package's messages on rank 0, warnings from everywhere; libraries keep quiet."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("nemo_lmpo").setLevel(logging.INFO if launch.is_main else logging.ERROR)
    logging.getLogger("nv_one_logger").setLevel(logging.ERROR)  # NeMo's telemetry, which nothing here turns on
    for message in _SAID_BY_THE_BANNER:
        warnings.filterwarnings("ignore", message, UserWarning, r"megatron\.core\.")


if __name__ == "__main__":
    sys.exit(main())
