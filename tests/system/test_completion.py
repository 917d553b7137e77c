"""What a shell offers after TAB: commands, recipes, settings, options."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest


def offered(line: str) -> list[str]:
    """The completions of a command line, as argcomplete's shell function asks for them: written to descriptor 8."""
    with tempfile.TemporaryFile("w+") as answer:
        asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_POINT": str(len(line))}
        code = f"import os, sys; os.dup2({answer.fileno()}, 8); from nemo_lmpo.cli import main; main([])"
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **asked, "COMP_TYPE": "9"},
            pass_fds=[answer.fileno()],
            check=True,
            capture_output=True,
        )
        answer.seek(0)
        return [word.strip() for word in answer.read().split("\n")]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nemo-lmpo tra", ["train", "trace"]),
        ("nemo-lmpo train lmpo_ti", ["lmpo_tiny"]),
        ("nemo-lmpo train lmpo_tiny optim.sched.w", ["optim.sched.warmup_fraction="]),
        ("nemo-lmpo generate --mo", ["--model"]),
        ("nemo-lmpo convert nemo", ["nemo-to-hf"]),
    ],
)
def test_completions(line: str, expected: list[str]) -> None:
    assert offered(line) == expected
