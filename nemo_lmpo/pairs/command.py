"""The command `nemo-lmpo pairs`: preference pairs of a model's own answers. Imports nothing heavy."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from nemo_lmpo.formats.find_model import MODEL_HELP
from nemo_lmpo.pairs.options import CHOOSE, SAMPLE, SCORE, add_options
from nemo_lmpo.runtime.command import RESUME

_logger = logging.getLogger("nemo_lmpo")


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Make preference pairs of a model's own answers: sample several to each prompt, score them, choose "
        "a better and a worse one. An interrupted command, repeated, resumes. Keys of servers are read from the "
        "environment.",
    )
    parser.add_argument(
        "--model", required=True, action="append", metavar="MODEL", help=f"{MODEL_HELP}; repeated: a mix of models"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the pairs' folder")
    parser.add_argument(
        "--endpoint", action="append", metavar="URL", help="a server with the model (default: transformers, here)"
    )
    parser.add_argument(
        "--served-name", action="append", metavar="NAME", help="the model's name there (default: the only one)"
    )
    parser.add_argument(
        "--until", choices=(SAMPLE, SCORE, CHOOSE), default=CHOOSE, help="the last stage to run (default: choose)"
    )
    add_options(parser)
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="push the pairs there as a dataset")
    parser.add_argument("--private", action="store_true", help="make the repository private if it is made")
    parser.set_defaults(run=_run, when_interrupted=RESUME)
    return parser


def _run(options: argparse.Namespace) -> int:
    from nemo_lmpo.pairs.folder import STAYS_HERE
    from nemo_lmpo.pairs.run import make_pairs

    folder = make_pairs(options)
    if options.push_to_hub and options.until == CHOOSE:
        from nemo_lmpo.runtime.push_to_hub import push

        address = push(folder, options.push_to_hub, private=options.private, kind="dataset", leave_out=list(STAYS_HERE))
        _logger.info("pushed: %s", address)
    return 0
