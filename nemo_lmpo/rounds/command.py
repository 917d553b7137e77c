"""The command `nemo-lmpo rounds`: pairs of own answers and training on them, again and again. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_lmpo.pairs.options import add_options
from nemo_lmpo.rounds.plan import FIRST, PREVIOUS
from nemo_lmpo.runtime.command import RESUME


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="In each round: sample answers from the newest policy, score them, choose pairs, train on them. An "
        "interrupted command, repeated, resumes.",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of every round's training")
    parser.add_argument("--config-name", required=True, metavar="RECIPE", help="of the training")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder with recipes of one's own")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the rounds' folder")
    parser.add_argument(
        "--reference",
        choices=(FIRST, PREVIOUS),
        default=FIRST,
        help="of losses that have one: the first model (default), or each round's start",
    )
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="of a training, by torchrun (default: 1)")
    add_options(parser)
    parser.set_defaults(run=_run, when_interrupted=RESUME)
    return parser


def _run(options: argparse.Namespace) -> int:
    from nemo_lmpo.rounds.drive import run_rounds

    run_rounds(options)
    return 0
