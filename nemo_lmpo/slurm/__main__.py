"""The command `python -m nemo_lmpo.slurm`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_lmpo.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_lmpo.slurm", description="Submit training runs to Slurm, and see how they do."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    submit = commands.add_parser(
        "submit",
        help="validate a recipe for the GPUs asked for, then submit it",
        description="Validates the recipe for that many GPUs, shows the layout and the memory expected, prints the "
        "sbatch line and submits it. A setting with several values (loss.lam=0.05,0.2) makes it a sweep.",
        epilog="Options for sbatch itself, such as the partition, come from slurm/cluster.env or --sbatch.",
    )
    submit.add_argument("recipe", metavar="RECIPE", help="a recipe of the package or of --config-dir")
    submit.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of the job (default: 1)")
    submit.add_argument("--gpus-per-node", type=int, default=4, metavar="N", help="GPUs of a node (default: 4)")
    submit.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder with recipes of your own")
    submit.add_argument("--time", metavar="LIMIT", help="the job's time limit, as HH:MM:SS (default: the template's)")
    submit.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="one more option, as --sbatch=--dependency=..."
    )
    submit.add_argument("--print", action="store_true", dest="print_only", help="validate and print, do not submit")
    submit.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the recipe")
    status = commands.add_parser("status", help="state, step, loss and time left of runs, from their metrics files")
    status.add_argument("runs", nargs="*", type=Path, metavar="RUN_DIR", help="default: all runs in ./runs")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = build_parser()
    # Overrides and options may stand in any order; plain parse_args gives up at the second group of overrides.
    options, rest = parser.parse_known_args(arguments)
    if rest and (options.command != "submit" or any(item.startswith("-") for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if options.command == "status":
            from nemo_lmpo.slurm.status import show_status

            print(show_status(options.runs))  # noqa: T201  (the answer)
            return 0
        from nemo_lmpo.slurm.submit import Submission, submit

        return submit(
            Submission(
                recipe=options.recipe,
                overrides=(*options.overrides, *rest),
                nodes=options.nodes,
                gpus_per_node=options.gpus_per_node,
                config_dir=options.config_dir,
                time_limit=options.time,
                sbatch_options=tuple(options.sbatch),
            ),
            print_only=options.print_only,
        )
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)  # noqa: T201  (the one message of a failed command)
        return 1


if __name__ == "__main__":
    sys.exit(main())
