"""The command `nemo-lmpo fetch`: a recipe's model, tokenizer and data from the hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nemo_lmpo.errors import ConfigError, counted
from nemo_lmpo.runtime.command import answer
from nemo_lmpo.runtime.files import format_bytes


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Bring what a recipe needs of the hub to this machine: model, tokenizer and data. Run it where "
        "there is a network; the same command resumes. The data of evaluations has `evaluate fetch`.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe of the package or of --config-dir, or its file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the recipe")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder with recipes of your own")
    parser.add_argument("--to", type=Path, metavar="DIR", help="a folder to copy (default: the hub's cache)")
    parser.set_defaults(run=_run, when_interrupted="what was fetched is kept; run the same command to resume")
    return parser


def _run(options: argparse.Namespace) -> int:
    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.fetch.bring import bring, needs_of

    config = load_recipe(options.recipe, options.overrides, config_dir=options.config_dir)
    needs, here = needs_of(config)
    folder = None if options.to is None else options.to.expanduser().absolute()
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ConfigError(f"--to {folder} is not a directory; give another path")
    for name in here:
        answer(f"here: {name}")
    for need in needs:
        brought = bring(need, folder)
        size = format_bytes(brought.size)
        answer(f"fetched: {need.kind} {need.name}, {counted(brought.files, 'file')}, {size}, in {brought.folder}")
    if not needs:
        answer("nothing to fetch: the recipe names nothing on the hub")
    elif folder is not None:
        answer(f"copy {folder} to the cluster, and there: export HF_HUB_OFFLINE=1 HF_HUB_CACHE={folder}")
    sys.stdout.flush()
    return 0
