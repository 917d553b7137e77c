"""The command `nemo-lmpo report`: draw the report of a run."""

from __future__ import annotations

import argparse
import sys

from nemo_lmpo.report import write_report


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Draw the curves of a run: RUN_DIR/report.html, and PNG files under RUN_DIR/report/.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a run's directory, with metrics.jsonl in it")
    parser.add_argument("--output", metavar="FILE", help="write the page here instead")
    parser.set_defaults(run=_run)
    return parser


def _run(options: argparse.Namespace) -> int:
    sys.stdout.write(f"{write_report(options.run_dir, options.output)}\n")
    return 0
