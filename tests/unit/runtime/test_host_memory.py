"""The memory that a process may still take, under limits of control groups of both versions."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from nemo_lmpo.runtime.host_memory import available_bytes


def put(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"memory.{name}").write_text(content)


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({"job": ("1000", "300")}, 700),
        ({"job/step": ("max", "300"), "job": ("1000", "600")}, 400),  # the outer one
        ({"job/step": ("500", "300"), "job": ("1000", "600")}, 200),
        ({"job": ("500", "600")}, 0),
    ],
)
def test_version_2(limits: dict[str, tuple[str, str]], left: int, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/job/step\n")
    for name, (most, used) in limits.items():
        put(tmp_path / "groups" / name, max=most, current=used)
    assert available_bytes(own, tmp_path / "groups") == left


def test_what_files_keep_in_memory_can_be_taken(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/job\n")
    put(tmp_path / "groups" / "job", max="1000", current="900", stat="anon 200\ninactive_file 600\nfile 700\n")
    assert available_bytes(own, tmp_path / "groups") == 700


def test_version_1(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("3:cpu,cpuacct:/elsewhere\n2:memory:/job\n")
    put(tmp_path / "groups" / "memory" / "job", limit_in_bytes="1000", usage_in_bytes="900", stat="cache 100\n")
    assert available_bytes(own, tmp_path / "groups") == 200


def test_no_limit_is_what_the_machine_has(tmp_path: Path) -> None:
    assert available_bytes(tmp_path / "none", tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
