"""What only a process of its own can show: its memory, and what a kill leaves."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nemo_lmpo.monitor.metrics_log import truncate_metrics

PROGRAM = """
import resource, torch
from nemo_lmpo.runtime.environment import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
for _ in range(40):  # the heap settles within some tens of aligned allocations
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again() -> None:
    faults = {}
    for keep in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(keep=keep)], capture_output=True, text=True, check=True
        )
        faults[keep] = int(done.stdout)
    # Five tensors of 64 MiB: with pages of 4 KiB 81920 faults where each is mapped anew, none where memory is kept.
    assert faults[True] < 5 * 32
    assert faults[False] >= 5 * 32  # pages of 2 MiB at the largest


def test_peak_memory_of_a_child_counts_its_own_allocations() -> None:
    program = (
        "import torch; torch.cuda.is_available = lambda: False\n"
        "from nemo_lmpo.monitor.throughput import peak_memory_gib\n"
        "before = peak_memory_gib(); block = b'x' * 2**28; after = peak_memory_gib(); del block\n"
        "print(before, after, peak_memory_gib())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after, later = map(float, result.stdout.split())
    assert 0.02 < before < 2.0
    assert 0.2 < after - before < 0.3  # 0.25 GiB
    assert later >= after - 1e-3


def test_killed_process_loses_at_most_the_last_line(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys
        from nemo_lmpo.config.schema import LoggingConfig
        from nemo_lmpo.monitor.metrics_log import MetricsLog
        log = MetricsLog(sys.argv[1], LoggingConfig(tensorboard=False), settings={}, resume_step=0)
        for step in range(1, 10**9):
            log.log(step, {"loss": 0.5})
            if step == 200:
                print("ready", flush=True)
        """
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        os.kill(process.pid, signal.SIGKILL)
    truncate_metrics(tmp_path / "metrics.jsonl", 10**9)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) >= 200
    assert steps == list(range(1, len(steps) + 1))
