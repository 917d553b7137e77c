"""Write the files of tried versions anew, with all that is installed: `make constraints`, `make constraints UPGRADE=1`.

`uv` resolves. Versions that a file has stay, unless upgrades are asked for; those that decide published numbers, or
have a CPU build that was tried, change by hand only (`Lock.held`). Transformer Engine's two files are short and written
by hand.
"""

from __future__ import annotations

import datetime
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from nemo_lmpo.evaluate.make_environment import CONSTRAINTS, PACKAGES

ROOT = Path(__file__).resolve().parent.parent
PROJECT = ("pyproject.toml", "--extra", "test", "--extra", "dev")


@dataclass(frozen=True)
class Lock:
    """A file of versions."""

    path: Path
    about: str
    python: str
    requirements: tuple[str, ...]
    """Files and options of uv."""
    packages: tuple[str, ...] = ()
    """Requirements that stand in no file."""
    held: tuple[str, ...] = ()
    """Packages whose version changes by hand only."""


LOCKS = (
    Lock(
        ROOT / "constraints.txt",
        "The versions this project was tested with, on Python 3.11. Use: `pip install -c constraints.txt ...`; an\n"
        "unpinned torch resolves to the newest build, with several gigabytes of CUDA libraries.",
        "3.11",
        PROJECT,
        held=("torch", "megatron-core"),
    ),
    Lock(
        ROOT / "constraints-latest.txt",
        "The newest engine that pyproject.toml admits; needs Python 3.12. Used by `make test-latest`.",
        "3.12",
        PROJECT,
        held=("torch",),
    ),
    Lock(
        ROOT / "constraints-docs.txt",
        "The generator of the documentation's site (`make docs`); it lives apart from the project's environment.",
        "3.11",
        (),
        packages=("zensical",),
    ),
    Lock(
        CONSTRAINTS,
        "The scoring environment (`nemo-lmpo evaluate environment`): what decides AlpacaEval's and the leaderboard's\n"
        "numbers. It lives apart from training, since lm_eval's math tasks want another antlr4 than omegaconf, and\n"
        "alpaca_eval an older setuptools.",
        "3.11",
        (),
        packages=(*PACKAGES, "transformers", "datasets", "openai", "tiktoken", "patsy"),
        held=("torch", "alpaca-eval", "lm-eval", "setuptools", "scikit-learn", "transformers", "tiktoken", "litellm"),
    ),
)


def pins(path: Path) -> dict[str, str]:
    """Version by package, as a file has it."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return {
        name.lower().replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines if line)
    }


def renew(lock: Lock, *, upgrade: bool) -> None:
    """Resolve and write one file."""
    before = pins(lock.path)
    fixed = {name: version for name, version in before.items() if name in lock.held}
    given = "".join(f"{one}\n" for one in lock.packages) + "".join(f"{name}=={one}\n" for name, one in fixed.items())
    # What the file has is what uv prefers, so that nothing changes without need.
    preferred = [] if upgrade else [f"{name}=={version}" for name, version in before.items()]
    options = [
        "--python-version",
        lock.python,
        "--no-annotate",
        "--no-header",
        "--quiet",
        "--python-platform",
        "x86_64-unknown-linux-gnu",
    ]
    command = [
        str(Path(sys.executable).with_name("uv")),
        "pip",
        "compile",
        *lock.requirements,
        "-",
        *options,
        "-o",
        str(lock.path),
    ]
    lock.path.write_text("\n".join(preferred))
    done = subprocess.run(command, cwd=ROOT, input=given, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: uv cannot resolve {lock.path.name}; restore it with git")
    today = datetime.date.today()
    about = "".join(f"# {line}\n" for line in f"{lock.about}\nMade by `make constraints` on {today}.".splitlines())
    lock.path.write_text(about + lock.path.read_text())


if __name__ == "__main__":
    for each in LOCKS:
        renew(each, upgrade="--upgrade" in sys.argv[1:])
