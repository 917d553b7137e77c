"""`python -m nemo_lmpo.evaluate COMMAND`: from a trained run to the paper's tables."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence

from nemo_lmpo.errors import ConfigError, UserError
from nemo_lmpo.evaluate.options import build_parser
from nemo_lmpo.evaluate.suites import ALPACA_EVAL, ARENA_HARD, LEADERBOARD

_logger = logging.getLogger("nemo_lmpo")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = build_parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    _logger.setLevel(logging.INFO)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it reports every retry
    command = shlex.join(["python", "-m", "nemo_lmpo.evaluate", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        return _run(options, command)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; repeat the command to go on\n")
        return 130
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def _run(options: argparse.Namespace, command: str) -> int:
    if options.command in (ALPACA_EVAL, ARENA_HARD):
        given = [name for name in ("model", "answers", "anchor") if getattr(options, name) is not None]
        if len(given) != 1:
            told = " and ".join(f"--{name}" for name in given) or "none"
            raise ConfigError(f"give one of --model, --answers and --anchor, not {told}")
        from nemo_lmpo.evaluate.pairwise import run

        _logger.info("result: %s", run(options, command))
        return 0
    if options.command == LEADERBOARD:
        from nemo_lmpo.evaluate.leaderboard import run as run_leaderboard

        _logger.info("result: %s", run_leaderboard(options, command))
        return 0
    if options.command == "export":
        from nemo_lmpo.evaluate.leaderboard import export

        sys.stdout.write(f"{export(options.model, options.output)}\n")
        return 0
    if options.command == "tables":
        from nemo_lmpo.paper.tables.page import write_tables

        _logger.info("page: %s", write_tables(options.folders, options.output))
        return 0
    if options.command == "fetch":
        from nemo_lmpo.evaluate.fetch import fetch

        _logger.info("data: %s", fetch(options))
        return 0
    return _check(options)


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


if __name__ == "__main__":
    sys.exit(main())
