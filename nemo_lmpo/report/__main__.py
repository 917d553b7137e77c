"""`python -m nemo_lmpo.report RUN_DIR`: write the report of a run."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from nemo_lmpo.errors import UserError
from nemo_lmpo.report import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_lmpo.report",
        description="Draw the curves of a run: RUN_DIR/report.html, and PNG files under RUN_DIR/report/.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a run's directory, with metrics.jsonl in it")
    parser.add_argument("--output", metavar="FILE", help="write the page here instead")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        page = write_report(options.run_dir, options.output)
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{page}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
