"""The command `nemo-lmpo evaluate`: from a trained run to the paper's tables. Imports nothing heavy."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_lmpo.errors import ConfigError
from nemo_lmpo.evaluate.make_environment import add_options, make_environment
from nemo_lmpo.evaluate.suites import ALPACA_EVAL, ARENA_HARD, LEADERBOARD, TASKS, TITLES
from nemo_lmpo.runtime.command import RESUME

_logger = logging.getLogger("nemo_lmpo")

_ABOUT = (
    "Evaluate models as the paper does, and lay the numbers beside its tables. An interrupted command, "
    "repeated, resumes. Keys of servers are read from the environment."
)


def build_parser(prog: str, extensions: Sequence[Callable[[Any], None]] = ()) -> argparse.ArgumentParser:
    """All subcommands; ``extensions`` add those of other rooms to the subparsers."""
    parser = argparse.ArgumentParser(prog=prog, description=_ABOUT)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for suite in (ALPACA_EVAL, ARENA_HARD):
        _add_pairwise(commands.add_parser(suite, help=f"answer, judge and score {TITLES[suite]}"), suite)
    _add_leaderboard(commands.add_parser(LEADERBOARD, help=f"ten tasks of the {TITLES[LEADERBOARD]}"))
    export = commands.add_parser("export", help="a Hugging Face directory that a server can load; prints where it is")
    export.add_argument("--model", required=True, metavar="MODEL", help="run, checkpoint, .nemo, directory or hub name")
    export.add_argument("--output", required=True, type=Path, metavar="DIR", help="unused if the model is one already")
    export.set_defaults(run=_export)
    fetch = commands.add_parser("fetch", help="bring everything from the network here, checked by hash")
    add_data(fetch)
    fetch.add_argument("--tasks", action="store_true", help="also the datasets of the leaderboard's tasks (Hub cache)")
    fetch.add_argument("--quiet", action="store_true", help="no progress bar")
    fetch.set_defaults(run=_fetch)
    environment = commands.add_parser("environment", help="make the environment that scores, once (2 GB)")
    add_options(environment)
    environment.set_defaults(run=_environment)
    for extend in extensions:
        extend(commands)
    for each in commands.choices.values():
        each.set_defaults(when_interrupted=RESUME)
    return parser


def add_data(parser: argparse.ArgumentParser) -> None:
    """The option for where the suites' data lies."""
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="the suites' data (default: NEMO_LMPO_EVAL_DATA, or the user's cache)"
    )


def _add_model(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--model", required=required, metavar="MODEL", help="run, checkpoint, .nemo, Hugging Face directory or hub name"
    )
    parser.add_argument("--name", metavar="NAME", help="what to call the model (default: from where it is)")
    parser.add_argument(
        "--row",
        metavar="SETTING/METHOD",
        help="the paper's row that it stands for, such as llama3_8b_base/LMPO/cube (default: as the run was trained)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: evals/NAME")
    parser.add_argument("--endpoint", metavar="URL", help="a server with the model (default: transformers, here)")
    parser.add_argument("--served-name", metavar="NAME", help="the model's name there (default: the only one)")
    parser.add_argument("--key", default="VLLM_API_KEY", metavar="VARIABLE", help="its key (default: VLLM_API_KEY)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="without a server (default: 16)")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="default: 42")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="try with N instructions; a later command with more continues"
    )
    parser.add_argument("--concurrency", type=int, default=16, metavar="N", help="requests at a time (default: 16)")
    parser.add_argument("--requests-per-minute", type=float, metavar="N", help="at most (default: no limit)")
    parser.add_argument("--retries", type=int, default=8, metavar="N", help="of a request (default: 8)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_pairwise(parser: argparse.ArgumentParser, suite: str) -> None:
    parser.set_defaults(run=_pairwise)
    _add_model(parser, required=False)
    given = parser.add_argument_group("answers that exist")
    given.add_argument("--answers", type=Path, metavar="FILE", help="in the suite's own form, instead of --model")
    given.add_argument("--anchor", metavar="NAME", help="a fetched model with published scores, instead of --model")
    judge = parser.add_argument_group("judge")
    judge.add_argument("--judge-endpoint", required=True, metavar="URL", help="an OpenAI-compatible server")
    judge.add_argument("--judge", metavar="NAME", help="the judge's name there (default: the only one)")
    judge.add_argument(
        "--judge-key", default="OPENAI_API_KEY", metavar="VARIABLE", help="its key (default: OPENAI_API_KEY)"
    )
    judge.add_argument(
        "--judge-price",
        type=_prices,
        metavar="IN,OUT",
        help="$ a million tokens, for the estimate before the first call",
    )
    extra = """JSON merged into each request, such as '{"reasoning_effort": "low"}'; null leaves a parameter out"""
    judge.add_argument("--judge-extra", default="{}", metavar="JSON", help=extra)
    if suite == ARENA_HARD:
        more_tokens = "of a judgment, its thoughts included (default: 4096, as released)"
        judge.add_argument("--judge-max-tokens", type=int, metavar="N", help=more_tokens)
    prompt = "another prompt than the released one: JSON with `system` and `template`"
    judge.add_argument(
        "--judge-prompt", type=Path, metavar="FILE", help=prompt if suite == ARENA_HARD else argparse.SUPPRESS
    )
    if suite == ALPACA_EVAL:
        parser.add_argument(
            "--bootstrap", type=int, default=1000, metavar="N", help="resamples for LC's interval (default: 1000)"
        )
    else:
        own = "other questions than Arena-Hard's: JSON Lines with `id`, `question`, `baseline_answer`"
        parser.add_argument("--questions", type=Path, metavar="FILE", help=own)
    more = parser.add_argument_group("generation (default: the paper's settings)")
    more.add_argument("--temperature", type=float, metavar="T", help="0: greedy")
    more.add_argument("--top-p", type=float, metavar="P", help="sample from the most likely tokens of P")
    more.add_argument("--max-new-tokens", type=int, metavar="N", help="maximum number of tokens of an answer")
    more.add_argument("--chat-template", metavar="NAME", help="a file or built-in name (default: as trained)")
    more.add_argument("--system-prompt", metavar="TEXT", help="default: as trained")
    more.add_argument("--allow-empty", action="store_true", help="score although more than 1 %% of answers are empty")
    add_data(parser)


def _prices(text: str) -> tuple[float, float]:
    parts = [float(part) for part in text.split(",")]
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"{text} is not IN,OUT")
    return parts[0], parts[1]


def _add_leaderboard(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_leaderboard)
    _add_model(parser, required=True)
    names = ", ".join(task.name for task in TASKS)
    parser.add_argument("--tasks", default="v1,v2", metavar="NAMES", help=f"v1, v2, or of {names} (default: v1,v2)")
    parser.add_argument(
        "--task-data",
        type=Path,
        metavar="DIR",
        help="take the tasks' rows from DIR/TASK.jsonl instead of the Hub (harness task names)",
    )


def _pairwise(options: argparse.Namespace) -> int:
    given = [name for name in ("model", "answers", "anchor") if getattr(options, name) is not None]
    if len(given) != 1:
        told = " and ".join(f"--{name}" for name in given) or "none"
        raise ConfigError(f"give one of --model, --answers and --anchor, not {told}")
    from nemo_lmpo.evaluate.pairwise import run

    _quiet_http()
    _logger.info("result: %s", run(options, options.command_line))
    return 0


def _leaderboard(options: argparse.Namespace) -> int:
    from nemo_lmpo.evaluate.leaderboard import run

    _quiet_http()
    _logger.info("result: %s", run(options, options.command_line))
    return 0


def _export(options: argparse.Namespace) -> int:
    from nemo_lmpo.evaluate.leaderboard import export

    sys.stdout.write(f"{export(options.model, options.output)}\n")
    return 0


def _fetch(options: argparse.Namespace) -> int:
    from nemo_lmpo.evaluate.fetch import fetch

    _quiet_http()
    _logger.info("data: %s", fetch(options))
    return 0


def _environment(options: argparse.Namespace) -> int:
    sys.stdout.write(f"{make_environment(options.output, options.python)}\n")
    return 0


def _quiet_http() -> None:
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it shows odd headers of servers with a traceback
