"""`evaluate environment`: a virtual environment with the packages that score, in the versions that decide numbers."""

from __future__ import annotations

import argparse
import logging
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from nemo_lmpo.errors import ConfigError, UserError, shown
from nemo_lmpo.evaluate.environment import VARIABLE, default_environment
from nemo_lmpo.runtime.files import file_hash, replace_file

CONSTRAINTS = Path(__file__).resolve().parent / "scoring" / "constraints.txt"
PACKAGES = ("torch", "alpaca_eval", "lm_eval[hf,api,math,ifeval]", "setuptools", "scikit-learn")
WITHOUT_DEPENDENCIES = ("litellm",)
"""Of which only the tables that count tokens are wanted, which tiktoken would download."""
_MARK = ".installed"

_logger = logging.getLogger("nemo_lmpo")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate environment`."""
    place = f"where (default: {default_environment()}, where it is found without {VARIABLE})"
    parser.add_argument("--output", type=Path, metavar="DIR", help=place)
    parser.add_argument(
        "--python", default=sys.executable, metavar="PROGRAM", help="Python to make it with (default: this)"
    )


def make_environment(output: Path | None, python: str) -> Path:
    """Make the scoring environment, unless it is there with the same constraints; returns its interpreter.

    Raises:
        ConfigError: the folder holds something else, or the Python does not run.
        UserError: pip failed.
    """
    folder = (output or default_environment()).absolute()
    interpreter, wanted = folder / "bin" / "python", file_hash(CONSTRAINTS)
    mark = folder / _MARK
    if mark.is_file() and mark.read_text() == wanted:
        return interpreter
    if folder.exists() and not (folder / "pyvenv.cfg").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{shown(folder)} exists and is not a virtual environment; name another --output")
    if shutil.which(python) is None:
        raise ConfigError(f"--python {shown(python)} is not a program")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _logger.info("making %s (a minute or two, 2 GB)", folder)
    _run([python, "-m", "venv", "--clear", str(folder)])
    pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(CONSTRAINTS)]
    _run([*pip, *PACKAGES])
    _run([*pip, "--no-deps", *WITHOUT_DEPENDENCIES])
    replace_file(mark, wanted)
    return interpreter


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-3:] or ["it said nothing"]
        raise UserError(f"{shlex.join(command)} failed with status {done.returncode}: {' | '.join(errors)}")
