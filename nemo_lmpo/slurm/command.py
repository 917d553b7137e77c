"""The command `nemo-lmpo slurm`."""

from __future__ import annotations

import argparse
from pathlib import Path


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(prog=prog, description="Submit training runs to Slurm, and see how they do.")
    commands = parser.add_subparsers(dest="command", required=True)
    submit = commands.add_parser(
        "submit",
        help="validate a recipe for the GPUs asked for, then submit it",
        description="Validates the recipe for that many GPUs, shows the layout and the memory expected, prints the "
        "sbatch line and submits it. A setting with several values (loss.lam=0.05,0.2) makes it a sweep.",
        epilog="Options for sbatch itself, such as the partition, come from slurm/cluster.env or --sbatch.",
    )
    submit.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a recipe of the package or of --config-dir, or the path of one",
    )
    submit.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of the job (default: 1)")
    submit.add_argument("--gpus-per-node", type=int, default=4, metavar="N", help="GPUs of a node (default: 4)")
    submit.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder with recipes of your own")
    submit.add_argument("--time", metavar="LIMIT", help="the job's time limit, as HH:MM:SS (default: the template's)")
    submit.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="one more option, as --sbatch=--dependency=..."
    )
    submit.add_argument("--print", action="store_true", dest="print_only", help="validate and print, do not submit")
    submit.add_argument(
        "--no-validate",
        action="store_false",
        dest="validate",
        help="submit without validation, from a machine that has not the packages which train",
    )
    submit.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the recipe")
    submit.set_defaults(run=_submit)
    templates = commands.add_parser(
        "templates",
        help="copy the templates and cluster.env.example into a folder of yours",
        description="Copies the templates of sbatch and cluster.env.example, for those who have no checkout. Files "
        "that you changed stay, unless you say --overwrite.",
    )
    templates.add_argument("folder", type=Path, metavar="DIR", help="as slurm")
    templates.add_argument("--overwrite", action="store_true", help="replace files that differ")
    templates.set_defaults(run=_templates)
    status = commands.add_parser("status", help="state, step, loss and time left of runs, from their metrics files")
    status.add_argument("runs", nargs="*", type=Path, metavar="RUN_DIR", help="default: all runs in ./runs")
    status.set_defaults(run=_status)
    return parser


def _status(options: argparse.Namespace) -> int:
    from nemo_lmpo.runtime.command import answer
    from nemo_lmpo.slurm.status import show_status

    answer(show_status(options.runs))
    return 0


def _templates(options: argparse.Namespace) -> int:
    from nemo_lmpo.runtime.command import answer
    from nemo_lmpo.slurm.cluster import copy_templates

    folder = copy_templates(options.folder, overwrite=options.overwrite)
    answer(
        f"copied; fill in {folder / 'cluster.env'} (from cluster.env.example), and export NEMO_LMPO_SLURM_DIR={folder}"
    )
    return 0


def _submit(options: argparse.Namespace) -> int:
    from nemo_lmpo.slurm.submit import Submission, submit

    return submit(
        Submission(
            recipe=options.recipe,
            overrides=tuple(options.overrides),
            nodes=options.nodes,
            gpus_per_node=options.gpus_per_node,
            config_dir=options.config_dir,
            time_limit=options.time,
            sbatch_options=tuple(options.sbatch),
            validate=options.validate,
        ),
        print_only=options.print_only,
    )
