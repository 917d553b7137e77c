import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from nemo_lmpo.runtime.cpu_memory import keep_freed_memory
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
def test_freed_memory_is_used_again():
    faults = {}
    for keep in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(keep=keep)], capture_output=True, text=True, check=True
        )
        faults[keep] = int(done.stdout)
    # Five tensors of 64 MiB: with pages of 4 KiB 81920 faults where each is mapped anew, none where memory is kept.
    assert faults[True] < 5 * 32
    assert faults[False] >= 5 * 32  # pages of 2 MiB at the largest
