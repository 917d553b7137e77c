"""The one door: `nemo-lmpo COMMAND ...`, or `python -m nemo_lmpo COMMAND ...`.

`python -m nemo_lmpo.COMMAND` is the same command. Only the module of the command that is asked for is imported.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from nemo_lmpo import __version__
from nemo_lmpo.errors import nearest
from nemo_lmpo.runtime.command import leave_out_working_directory, run_parser

PROGRAM = "nemo-lmpo"


@dataclass(frozen=True)
class Command:
    """A line of the table."""

    name: str
    summary: str
    parser: str
    """`module:function` that makes its parser from the program's name."""
    more: tuple[str, ...] = ()
    """`module:function`s that add subcommands, of rooms which the command's own does not know."""

    def build_parser(self, prog: str) -> argparse.ArgumentParser:
        """The command's parser; imports its module."""
        extensions = [_find(name) for name in self.more]
        parser: argparse.ArgumentParser = _find(self.parser)(prog, *([extensions] if extensions else []))
        return parser


COMMANDS = (
    Command("train", "train a policy on preference pairs", "nemo_lmpo.train:train_parser"),
    Command("check", "validate a run; show its layout and memory", "nemo_lmpo.train:check_parser"),
    Command("plan", "rank the layouts for a number of GPUs, fastest first", "nemo_lmpo.train:plan_parser"),
    Command("trace", "run the busiest ranks' step on fake tensors", "nemo_lmpo.train:trace_parser"),
    Command("slurm", "submit runs to Slurm, and show their state", "nemo_lmpo.slurm.command:build_parser"),
    Command("data", "show data as a run would load it", "nemo_lmpo.data.command:build_parser"),
    Command("fetch", "bring a recipe's model and data from the hub", "nemo_lmpo.fetch.command:build_parser"),
    Command("report", "draw a run's curves as one page", "nemo_lmpo.report.command:build_parser"),
    Command("generate", "answer prompts with a model", "nemo_lmpo.generate.command:build_parser"),
    Command("pairs", "make preference pairs of a model's own answers", "nemo_lmpo.pairs.command:build_parser"),
    Command("rounds", "pairs of own answers and training on them, repeated", "nemo_lmpo.rounds.command:build_parser"),
    Command(
        "evaluate",
        "score a model on AlpacaEval 2, Arena-Hard and the leaderboard's tasks",
        "nemo_lmpo.evaluate.command:build_parser",
        more=("nemo_lmpo.paper.tables.command:add_subcommands",),
    ),
    Command("export", "write a Hugging Face directory with a model card", "nemo_lmpo.export.command:build_parser"),
    Command("convert", "convert between Hugging Face and NeMo", "nemo_lmpo.convert.command:build_parser"),
    Command("compare", "rerun the paper's comparisons", "nemo_lmpo.paper.comparison.command:build_parser"),
    Command("doctor", "show what this machine can do", "nemo_lmpo.doctor.command:build_parser"),
)
_BY_NAME = {command.name: command for command in COMMANDS}


def _find(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    if arguments is None:
        leave_out_working_directory()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "_ARGCOMPLETE" in os.environ:
        complete()
    if not given or given[0] in ("-h", "--help", "help"):
        (sys.stdout if given else sys.stderr).write(help_text())
        return 0 if given else 2
    if given[0] == "--version":
        sys.stdout.write(f"{PROGRAM} {__version__}\n")
        return 0
    name, rest = given[0], given[1:]
    if name not in _BY_NAME:
        near = nearest(name, _BY_NAME)
        remedy = f"did you mean {near}?" if near else f"known: {', '.join(_BY_NAME)}"
        sys.stderr.write(f"error: {PROGRAM} has no command {name!r}; {remedy}\n")
        return 2
    return run_parser(_BY_NAME[name].build_parser(f"{PROGRAM} {name}"), rest)


class ModuleMain:
    """The main function of `python -m nemo_lmpo.NAME`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, arguments: Sequence[str] | None = None) -> int:
        """Run the command; returns the exit status."""
        if arguments is None:
            leave_out_working_directory()
        return run_parser(_BY_NAME[self._name].build_parser(f"python -m nemo_lmpo.{self._name}"), arguments)


def help_text() -> str:
    """The table of commands."""
    width = max(map(len, _BY_NAME))
    lines = [f"  {command.name:<{width}}  {command.summary}" for command in COMMANDS]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [--help] ...",
            "",
            "Preference optimization of language models on Megatron-Core: LMPO, and the methods it is compared with.",
            "",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help lists the options; --traceback shows where an error comes from.",
            f'Completion in bash: eval "$(register-python-argcomplete {PROGRAM})"',
            "",
        ]
    )


def complete() -> None:
    """Answer the shell, which asks for completions of a command line; ends the process."""
    import argcomplete

    words = shlex.split(os.environ.get("COMP_LINE", ""), posix=True)[1:]
    parser = argparse.ArgumentParser(PROGRAM)
    commands = parser.add_subparsers()
    for command in COMMANDS:
        if words[:1] == [command.name]:
            own = command.build_parser(f"{PROGRAM} {command.name}")
            commands.add_parser(command.name, parents=[own], add_help=False, conflict_handler="resolve")
        else:
            commands.add_parser(command.name, help=command.summary)
    argcomplete.autocomplete(parser)


if __name__ == "__main__":
    sys.exit(main())
