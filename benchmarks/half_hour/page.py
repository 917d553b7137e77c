"""The page of a half-hour, made anew from the outputs of its pieces."""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.half_hour.journal import Outcome
from benchmarks.half_hour.pieces import Piece

REHEARSED = (
    "**A rehearsal**: the CPU in the GPU's place, small shapes. No speed and no memory here means anything; what it "
    "shows is that every piece runs to its end."
)
_PARTS = {"attention": "Attention", "rank": "Speed and memory against the plan", "engine": "With Transformer Engine"}
_LAST_LINES = 30


def make_page(pieces: Sequence[Piece], outcomes: Mapping[str, Outcome], work: Path, *, rehearsed: bool) -> str:
    """Markdown: the machine, kernels and parity, tests, speed and memory, checkpoints, and what failed."""
    doctor = _output(work, "doctor").rstrip()
    lines = [f"# One GPU, {datetime.datetime.now(datetime.UTC):%F}", "", f"Commit {_commit()}."]
    lines += ["", REHEARSED] if rehearsed else []
    lines += ["", *_state(pieces, outcomes)]
    lines += ["", "## Machine, kernels, parity", "", "```", doctor or "not run yet", "```"]
    lines += ["", "## Tests", "", *_tests(pieces, work)]
    for part, title in _PARTS.items():
        lines += ["", f"## {title}", "", *(_tables(part, pieces, work) or ["not run yet"])]
    lines += ["", "## Training and checkpoints", "", *_runs(pieces, outcomes, work)]
    lines += _failures(pieces, outcomes, work)
    return "\n".join(lines) + "\n"


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _output(work: Path, piece: str) -> str:
    path = work / f"{piece}.txt"
    return path.read_text(errors="replace") if path.exists() else ""


def _state(pieces: Sequence[Piece], outcomes: Mapping[str, Outcome]) -> list[str]:
    seconds = sum(one.seconds for one in outcomes.values())
    failed = sum(one.status != 0 for one in outcomes.values())
    left = len(pieces) - len(outcomes)
    return [f"{len(outcomes)} of {len(pieces)} pieces in {seconds:.0f} s; {failed} failed, {left} are left."]


def _tests(pieces: Sequence[Piece], work: Path) -> list[str]:
    rows = ["| tests | passed | failed | skipped, and why |", "|---|---|---|---|"]
    for piece in pieces:
        path = work / f"{piece.name}.xml"
        if path.exists():
            rows.append(f"| {piece.title} | {' | '.join(_counts(path))} |")
    return rows if len(rows) > 2 else ["not run yet"]


def _counts(path: Path) -> tuple[str, str, str]:
    try:
        suite = next(ElementTree.parse(path).iter("testsuite"))  # written by pytest a moment ago
    except (ElementTree.ParseError, StopIteration):
        return "-", "the report is not whole", "-"
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    skipped = int(suite.get("skipped", 0))
    reasons = sorted({found.get("message", "") for found in suite.iter("skipped")})
    passed = int(suite.get("tests", 0)) - failed - skipped
    return str(passed), str(failed), f"{skipped}{': ' if skipped else ''}{'; '.join(reasons)}"


def _tables(part: str, pieces: Sequence[Piece], work: Path) -> list[str]:
    """The tables that a part's pieces print; rows of the same columns stand together."""
    tables: dict[str, list[str]] = {}
    for piece in pieces:
        if piece.part != part:
            continue
        rows = [line for line in _output(work, piece.name).split("\n") if line.startswith("|")]
        for row in rows[2:]:
            tables.setdefault("\n".join(["| piece " + rows[0], "|---" + rows[1]]), []).append(f"| {piece.title} {row}")
    found: list[str] = []
    for head, rows in tables.items():
        found += [*([""] if found else []), head, *rows]
    return found


def _runs(pieces: Sequence[Piece], outcomes: Mapping[str, Outcome], work: Path) -> list[str]:
    rows = ["| run | how it ended | steps | median s a step | peak GiB | checkpoints |", "|---|---|---|---|---|---|"]
    for piece in pieces:
        if piece.directory is not None and piece.name in outcomes:
            rows.append(f"| {piece.title} | {outcomes[piece.name].words} | {' | '.join(_metrics(work, piece.name))} |")
    return rows if len(rows) > 2 else ["not run yet"]


def _metrics(work: Path, piece: str) -> Iterator[str]:
    path = work / f"{piece}.metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = [line for line in lines if "step_seconds" in line]
    yield f"{steps[-1]['step']}" if steps else "-"
    yield f"{statistics.median(line['step_seconds'] for line in steps):.3f}" if steps else "-"
    yield f"{max(line['memory/peak'] for line in steps):.1f}" if steps else "-"
    saving = {name: value for line in lines for name, value in line.items() if name.startswith("checkpoint/")}
    yield ", ".join(f"{name.removeprefix('checkpoint/')} {value:.2f}" for name, value in saving.items()) or "-"


def _failures(pieces: Sequence[Piece], outcomes: Mapping[str, Outcome], work: Path) -> list[str]:
    lines: list[str] = []
    for piece in pieces:
        if piece.name in outcomes and outcomes[piece.name].status != 0:
            last = _output(work, piece.name).rstrip().split("\n")[-_LAST_LINES:]
            lines += ["", f"## Failed: {piece.title}", "", f"{outcomes[piece.name].words}; its last lines:"]
            lines += ["", "```", *last, "```"]
    return lines
