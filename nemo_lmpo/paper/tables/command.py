"""Subcommands of `nemo-lmpo evaluate` that know the paper: `tables` and `check`. Imports nothing heavy."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from nemo_lmpo.evaluate.command import add_data

_logger = logging.getLogger("nemo_lmpo")


def add_subcommands(commands: Any) -> None:
    """Add them to the subparsers of `evaluate`."""
    tables = commands.add_parser("tables", help="one page: the paper's tables beside what was measured")
    tables.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="evaluations (default: evals/*)")
    tables.add_argument("--output", type=Path, default=Path("evals"), metavar="DIR", help="(default: evals)")
    tables.set_defaults(run=_tables)
    check = commands.add_parser("check", help="recompute published rows: proves the scoring on this machine")
    add_data(check)
    check.set_defaults(run=_check)


def _tables(options: argparse.Namespace) -> int:
    from nemo_lmpo.paper.tables.page import write_tables

    _logger.info("page: %s", write_tables(options.folders, options.output))
    return 0


def _check(options: argparse.Namespace) -> int:
    from nemo_lmpo.evaluate.data_files import data_folder
    from nemo_lmpo.evaluate.environment import packages
    from nemo_lmpo.paper.tables.check_scoring import check

    versions = packages()
    rows = check(data_folder(options.data), lambda line: sys.stdout.write(f"{line}\n"))
    wrong = [row for row in rows if not row.passed]
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    sys.stdout.write(f"{len(rows) - len(wrong)} of {len(rows)} rows agree with what was published ({shown})\n")
    return 1 if wrong else 0
