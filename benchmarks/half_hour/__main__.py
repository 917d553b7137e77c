"""Runs the pieces that are left, as far as the time goes, and writes the page.

bash benchmarks/gpu_half_hour.sh [--rehearse] [--seconds 570] [--fresh] [PART ...]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.half_hour.execute import Execute, execute, rehearse
from benchmarks.half_hour.journal import Journal, Outcome
from benchmarks.half_hour.page import make_page
from benchmarks.half_hour.pieces import Piece, pieces
from nemo_lmpo.runtime.environment import prepare_environment
from nemo_lmpo.runtime.files import replace_file
from nemo_lmpo.runtime.run_files import METRICS

MORE_TO_DO = 75
"""The status when pieces are left (`EX_TEMPFAIL`): run the same command again."""
_PATIENCE = 2.0
"""How many times its estimate a piece may take."""


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="gpu_half_hour.sh",
        description="What half an hour on one GPU can prove, in pieces of a few minutes. Run it again until its status "
        f"is not {MORE_TO_DO}: it goes on where it was stopped, also after a kill.",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="only these: " + " ".join(_parts()))
    parser.add_argument("--rehearse", action="store_true", help="the CPU in the GPU's place, small shapes")
    parser.add_argument("--seconds", type=float, default=570.0, help="begin no piece that takes longer (default: 570)")
    parser.add_argument("--fresh", action="store_true", help="begin anew")
    parser.add_argument("--work", type=Path, default=Path(".gpu-half-hour"), help="outputs (default: .gpu-half-hour)")
    parser.add_argument("--results", type=Path, help="the page (default: benchmarks/results/gpu.md, rehearsed WORK)")
    return parser


def _parts() -> list[str]:
    return list(dict.fromkeys(piece.part for piece in pieces(Path(), rehearse=False)))


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 where a piece failed, or that there is more to do."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(_parts()):
        parser.error(f"{', '.join(sorted(unknown))} is unknown; the parts are {' '.join(_parts())}")
    work: Path = options.work / ("rehearsal" if options.rehearse else "gpu")
    if options.fresh:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    results = options.results or (work / "page.md" if options.rehearse else Path("benchmarks/results/gpu.md"))
    run: Execute = execute
    if options.rehearse:
        from tests.rehearsal.install import install

        install()
        import tests.distributed.preload  # noqa: F401

        run = rehearse
    else:
        prepare_environment()
    wanted = [piece for piece in pieces(work, rehearse=options.rehearse) if _can_run(piece, options.parts)]
    return run_pieces(wanted, work, results, run=run, seconds=options.seconds, rehearsed=options.rehearse)


def _can_run(piece: Piece, parts: Sequence[str]) -> bool:
    """Whether a piece is asked for; without Transformer Engine its pieces are not."""
    from tests.te_emulation.host import find_python

    if parts and piece.part not in parts:
        return False
    return piece.part != "engine" or bool(importlib.util.find_spec("transformer_engine") or find_python())


def run_pieces(
    wanted: Sequence[Piece], work: Path, results: Path, *, run: Execute, seconds: float, rehearsed: bool
) -> int:
    """Run what is left of these, and write the page after each.

    Args:
        wanted: the pieces, in order.
        work: where the journal and the outputs are.
        results: the page.
        run: how a command is run.
        seconds: from now on; a piece that would take longer is left for another time.
        rehearsed: whether the CPU is in the GPU's place.

    Returns:
        The exit status.
    """
    until = time.monotonic() + seconds
    journal = Journal(work / "journal.json")
    for piece in wanted:
        if piece.name in journal.outcomes:
            continue
        left = until - time.monotonic()
        if left < piece.seconds:
            break
        print(f"{piece.title} ...", end=" ", flush=True)
        if journal.begin(piece.name):
            journal.end(piece.name, _run(piece, work, run, min(left, _PATIENCE * piece.seconds)))
        print(journal.outcomes[piece.name].words, flush=True)
        replace_file(results, make_page(wanted, journal.outcomes, work, rehearsed=rehearsed))
    replace_file(results, make_page(wanted, journal.outcomes, work, rehearsed=rehearsed))
    left_over = [piece.title for piece in wanted if piece.name not in journal.outcomes]
    failed = [piece.title for piece in wanted if journal.outcomes.get(piece.name, Outcome(0, 0)).status != 0]
    print(f"page: {results}")
    if failed:
        print(f"failed: {'; '.join(failed)}")
    if left_over:
        print(f"{len(left_over)} pieces are left; run the same command again")
        return MORE_TO_DO
    return 1 if failed else 0


def _run(piece: Piece, work: Path, run: Execute, seconds: float) -> Outcome:
    directory = work / piece.directory if piece.directory is not None else None
    if directory is not None and not piece.continues:
        shutil.rmtree(directory, ignore_errors=True)
    started = time.monotonic()
    status = run(piece.command, dict(piece.environment), work / f"{piece.name}.txt", seconds)
    if directory is not None and (directory / METRICS).exists():
        shutil.copyfile(directory / METRICS, work / f"{piece.name}.metrics.jsonl")
    return Outcome(status, time.monotonic() - started)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
