"""The architecture of the machine's GPUs, from a small library with NVML's functions."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from nemo_lmpo.runtime.nvml import oldest_architecture

SOURCE = """
static int majors[] = {MAJORS};
int nvmlInit_v2(void) { return INIT; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = sizeof majors / sizeof *majors; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = majors + index; return 0; }
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    *major = *(int *)handle; *minor = 0; return *major < 0 ? 3 : 0;
}
"""
pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
    pytest.mark.processes,  # the compiler
]


@pytest.mark.parametrize(
    ("majors", "status", "expected"),
    [("10, 10", 0, 10), ("10, 9", 0, 9), ("8", 0, 8), ("-1, 12", 0, 12), ("-1", 0, None), ("9", 9, None)],
)
def test_the_oldest_one_counts(majors: str, status: int, expected: int | None, tmp_path: Path) -> None:
    source, library = tmp_path / "nvml.c", tmp_path / "libnvml.so"
    source.write_text(SOURCE.replace("MAJORS", majors).replace("INIT", str(status)))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    assert oldest_architecture(str(library)) == expected


def test_without_a_driver_there_is_no_answer(tmp_path: Path) -> None:
    assert oldest_architecture(str(tmp_path / "libnvidia-ml.so.1")) is None
    (tmp_path / "odd.so").write_text("no library")
    assert oldest_architecture(str(tmp_path / "odd.so")) is None
    assert oldest_architecture("libc.so.6") is None, "none of NVML's functions"
