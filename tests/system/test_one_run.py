"""The lock of a run directory over processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nemo_lmpo.errors import ConfigError
from nemo_lmpo.runtime.files import directory_lock


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    code = "import sys, time, pathlib; from nemo_lmpo.runtime.files import directory_lock\n"
    code += "with directory_lock(pathlib.Path(sys.argv[1])): print('locked', flush=True); time.sleep(100)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=f"process {process.pid} "), directory_lock(tmp_path, patience=0):
            pass
        process.kill()
    with directory_lock(tmp_path, patience=0):
        pass
