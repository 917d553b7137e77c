"""Conversions that end in the middle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from nemo_lmpo.convert.command import hf_to_nemo
from tests.unit.formats import tiny_models as tiny

_KILLS_ITSELF = """
import os, signal, sys
from pathlib import Path
from nemo_lmpo.formats import conversion, model_files
work = conversion.plan(model_files.open_model(Path(sys.argv[1])), Path(sys.argv[2]))
stop = lambda name: os.kill(os.getpid(), signal.SIGKILL) if 'layers.2' in name else None
conversion.write_nemo(work, progress=stop)
"""


def test_killed_process_leaves_no_output_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    source = tiny.save("llama3", tmp_path / "hf")
    output = tmp_path / "x.nemo"
    command = [sys.executable, "-c", _KILLS_ITSELF, str(source), str(output)]
    assert subprocess.run(command, check=False).returncode == -9
    assert not output.exists()
    (left,) = (path.name for path in tmp_path.iterdir() if path.name.startswith("."))
    assert left.endswith(".partial")
    assert hf_to_nemo(["--input", str(source), "--output", str(output), "--quiet"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "x.nemo"]
