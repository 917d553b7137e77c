"""The command `nemo-lmpo export`: a trained run as a Hugging Face directory with a model card."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from nemo_lmpo.runtime.command import RESUME

_logger = logging.getLogger("nemo_lmpo")


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write a run's newest checkpoint as a Hugging Face directory with tokenizer, chat template, "
        "generation config and a model card, and push it to the hub if asked.",
    )
    parser.add_argument("model", metavar="MODEL", help="a run directory, or one of its checkpoints")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: huggingface in the run directory")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of the weights (default: as they are)")
    parser.add_argument(
        "--evaluations", type=Path, nargs="+", default=[], metavar="DIR", help="results of nemo_lmpo.evaluate to show"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="push it there")
    parser.add_argument("--private", action="store_true", help="make the repository private if it is made")
    parser.set_defaults(run=_run, when_interrupted=RESUME)
    return parser


def _run(options: argparse.Namespace) -> int:
    from nemo_lmpo.export.write import export_run
    from nemo_lmpo.runtime.push_to_hub import push

    output = export_run(
        options.model,
        options.output,
        dtype=options.dtype,
        name=options.push_to_hub,
        evaluations=options.evaluations,
        overwrite=options.overwrite,
    )
    _logger.info("exported: %s", output)
    if options.push_to_hub:
        _logger.info("pushed: %s", push(output, options.push_to_hub, private=options.private))
    return 0
