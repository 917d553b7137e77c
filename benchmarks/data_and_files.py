"""Tokens and bytes against the machine's own speed: so far, writing and checking a checkpoint's files against `cat`.

Each round writes the same bytes once by the checkpoint's writers (two files, with checksums, until the disk confirms)
and once by `cat` and `sync`, then reads them for their checksums and by `cat`; ratios are of one run, alternated.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from nemo_lmpo.checkpoint.writers import WriteResults, _Writers
from nemo_lmpo.runtime.files import file_checksum


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.monotonic()
    action()
    return time.monotonic() - started


def shell(command: str) -> Callable[[], object]:
    """A command of the shell, to be run."""
    return lambda: subprocess.run(command, shell=True, check=True)


def rounds(folder: Path, num_bytes: int, times: int) -> dict[str, list[float]]:
    """Seconds of each way by round."""
    tensors = [torch.randn(2**22) for _ in range(num_bytes // 2**24)]
    files = [folder / f"__0_{number}.distcp" for number in (0, 1)]
    items: list[list[Any]] = [[(SimpleNamespace(index=n), t) for n, t in enumerate(tensors)][k::2] for k in (0, 1)]
    buckets: list[Any] = [(str(file), file.name, ([], part)) for file, part in zip(files, items, strict=True)]
    names = " ".join(map(str, files))
    found: dict[str, list[float]] = {"write": [], "cat and sync": [], "check": [], "cat": []}
    for _ in range(times):
        found["write"].append(seconds(lambda: _Writers(WriteResults())(0, buckets, WriteResults())))
        copy = folder / "copy"
        found["cat and sync"].append(seconds(shell(f"cat {names} > {copy} && sync {copy}")))
        copy.unlink()
        found["check"].append(seconds(lambda: [file_checksum(file) for file in files]))
        found["cat"].append(seconds(shell(f"cat {names} > /dev/null")))
    return found


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="on the disk that is measured (default: the system's temporary one)")
    parser.add_argument("--gib", type=float, default=1.0, help="bytes to write, GiB (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    wanted = parser.parse_args()
    num_bytes = max(2, int(wanted.gib * 64)) * 2**24
    with tempfile.TemporaryDirectory(dir=wanted.folder) as folder:
        found = {
            name: statistics.median(times) for name, times in rounds(Path(folder), num_bytes, wanted.rounds).items()
        }
    print("| what | GB/s | beside it | ratio |\n|---|---|---|---|")
    for what, beside in (("write", "cat and sync"), ("check", "cat")):
        speeds = [num_bytes / 1e9 / found[name] for name in (what, beside)]
        print(f"| {what} | {speeds[0]:.2f} | {beside}: {speeds[1]:.2f} | {speeds[0] / speeds[1]:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
