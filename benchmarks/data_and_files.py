#!/usr/bin/env python
"""Tokens and bytes against the machine's own speed, as a table: each line beside what it is measured against.

    python benchmarks/data_and_files.py [--gib 1] [--rounds 3] [--folder DIR] [--only conversion ...]

- checkpoint: two files written by the checkpoint's writers until the disk confirms, against `cat` and `sync` of the
  same bytes; the files read for their checksums, against `cat`.
- conversion: `hf-to-nemo` and `nemo-to-hf` of a Llama-shaped model, without imports, against `cat` and `sync`.
- start: `nemo-lmpo train` of `lmpo_tiny` until its first step and in all, against importing TRL's DPOTrainer.

All lines of a part are measured in turn, round by round, on one machine; figures are medians of the rounds. Nothing
else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Action = Callable[[], object]
_COPY = "cat and sync"


@dataclass(frozen=True)
class Line:
    """A line of the table: seconds of two actions, and what they handle."""

    what: str
    beside: str
    amount: float
    """Gigabytes that both handle; 0: seconds are shown."""

    def show(self, seconds: dict[str, float]) -> str:
        """The line in Markdown; the ratio is how fast the first is, in terms of the second."""
        own, other = seconds[self.what], seconds[self.beside]
        if self.amount:
            here, there = (f"{self.amount / took:.2f} GB/s" for took in (own, other))
        else:
            here, there = f"{own:.1f} s", f"{other:.1f} s"
        return f"| {self.what} | {here} | {self.beside}: {there} | {other / own:.2f} |"


def seconds(action: Action) -> float:
    """How long it takes."""
    started = time.monotonic()
    action()
    return time.monotonic() - started


def shell(command: str) -> Action:
    """A command of the shell, to be run."""
    return lambda: subprocess.run(command, shell=True, check=True)


def alternated(actions: dict[str, Action], rounds: int) -> dict[str, float]:
    """The median seconds of each action, run in turn."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            found[name].append(seconds(action))
    return {name: statistics.median(times) for name, times in found.items()}


def checkpoint(folder: Path, num_bytes: int, rounds: int) -> list[str]:
    """Lines of a checkpoint's files."""
    import torch

    from nemo_lmpo.checkpoint.writers import WriteResults, _Writers
    from nemo_lmpo.runtime.files import file_checksum

    tensors = [torch.randn(2**22) for _ in range(max(2, num_bytes // 2**24))]
    files = [folder / f"__0_{number}.distcp" for number in (0, 1)]
    items: list[list[Any]] = [[(SimpleNamespace(index=n), t) for n, t in enumerate(tensors)][k::2] for k in (0, 1)]
    buckets: list[Any] = [(str(file), file.name, ([], part)) for file, part in zip(files, items, strict=True)]
    names = " ".join(map(str, files))
    found = alternated(
        {
            "checkpoint: write": lambda: _Writers(WriteResults())(0, buckets, WriteResults()),
            _COPY: shell(f"cat {names} > {folder}/copy && sync {folder}/copy"),
            "checkpoint: check": lambda: [file_checksum(file) for file in files],
            "cat": shell(f"cat {names} > /dev/null"),
        },
        rounds,
    )
    size = len(tensors) * 2**24 / 1e9
    return [Line(*names, size).show(found) for names in (("checkpoint: write", _COPY), ("checkpoint: check", "cat"))]


def conversion(folder: Path, num_bytes: int, rounds: int) -> list[str]:
    """Lines of both directions."""
    import huggingface_hub  # noqa: F401  # imports are not measured
    import torch
    from safetensors.torch import save_file

    from benchmarks.conversion_memory import LLAMA, sized
    from nemo_lmpo.formats.architecture import architecture_to_hf
    from nemo_lmpo.formats.conversion import plan, write_huggingface, write_nemo
    from nemo_lmpo.formats.mapping import hf_shapes
    from nemo_lmpo.formats.model_files import open_model

    hf, nemo, back = folder / "hf", folder / "x.nemo", folder / "back"
    hf.mkdir()
    architecture = sized(LLAMA, num_bytes)
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in hf_shapes(architecture).items()}
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    del tensors
    settings = {**architecture_to_hf(architecture), "torch_dtype": "bfloat16"}
    (hf / "config.json").write_text(json.dumps(settings))
    found = alternated(
        {
            "hf-to-nemo": lambda: write_nemo(plan(open_model(hf), nemo), overwrite=True),
            "nemo-to-hf": lambda: write_huggingface(plan(open_model(nemo), back), overwrite=True),
            _COPY: shell(f"cat {hf}/model.safetensors > {folder}/copy && sync {folder}/copy"),
        },
        rounds,
    )
    return [Line(what, _COPY, size).show(found) for what in ("hf-to-nemo", "nemo-to-hf")]


def start(folder: Path, num_bytes: int, rounds: int) -> list[str]:
    """Lines of a start; the first step's time is in the run's metrics."""
    first: list[float] = []

    def train() -> None:
        run = folder / f"run_{len(first)}"
        began = time.time()
        command = [sys.executable, "-m", "nemo_lmpo.train", "--config-name", "lmpo_tiny"]
        subprocess.run(
            [*command, f"run_dir={run}", "trainer.max_steps=1", f"data.cache_dir={folder / 'cache'}"],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        first.append(line["time"] - began)

    trl = [sys.executable, "-c", "from trl import DPOTrainer"]
    whole, beside = "start: run of one step", "import of TRL's DPOTrainer"
    found = alternated({whole: train, beside: lambda: subprocess.run(trl, check=True, capture_output=True)}, rounds)
    to_first = "start: to the first step"
    found[to_first] = statistics.median(first)
    return [Line(what, beside, 0).show(found) for what in (to_first, whole)]


PARTS = {"checkpoint": checkpoint, "conversion": conversion, "start": start}


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="on the disk that is measured (default: the system's temporary one)")
    parser.add_argument("--gib", type=float, default=1.0, help="bytes to write, GiB (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    wanted = parser.parse_args()
    print("| what | here | beside it | ratio |\n|---|---|---|---|")
    for part in wanted.only:
        with tempfile.TemporaryDirectory(dir=wanted.folder) as folder:
            for line in PARTS[part](Path(folder), int(wanted.gib * 2**30), wanted.rounds):
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
