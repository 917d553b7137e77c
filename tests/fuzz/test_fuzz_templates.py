"""The 70 chat templates in the source archive of `llama-cpp-python`: every pair is right, or clearly different."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.errors import ConfigError
from tests.unit.data.template_walk import WRONG, judged

ROOT = Path(__file__).resolve().parents[2]

NEEDS_FUNCTIONS = {"fireworks-ai-llama-3-firefunction-v2"}
"""Templates that read a variable of their own, and say so."""


def templates() -> dict[str, str]:
    """By name, read from the archive."""
    folder = Path(os.environ.get("NEMO_LMPO_LLAMA_CPP", ROOT / ".llama-cpp"))
    archives = sorted(folder.glob("llama_cpp_python-*.tar.gz"))
    if not archives:
        pytest.skip(f"needs the source archive of llama-cpp-python in {folder}: make .llama-cpp")
    with tarfile.open(archives[-1]) as archive:
        members = [m for m in archive.getmembers() if "models/templates/" in m.name and m.name.endswith(".jinja")]
        return {Path(m.name).stem: archive.extractfile(m).read().decode() for m in members}


@pytest.mark.parametrize("prompt_from", ["conversation", "generation_prompt"])
def test_every_pair_is_right_or_clearly_different(prompt_from: str) -> None:
    found = templates()
    assert len(found) >= 60
    wrong: dict[str, Any] = {}
    refused: set[str] = set()
    for name, template in found.items():
        try:
            verdicts = judged(template, prompt_from=prompt_from)
        except ConfigError:
            refused.add(name)
            continue
        wrong |= {f"{name}: {case}": said.why for case, said in verdicts.items() if said.kind == WRONG}
    assert wrong == {}
    assert refused == NEEDS_FUNCTIONS
