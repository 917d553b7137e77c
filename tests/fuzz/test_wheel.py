"""The wheel in a fresh environment of every Python that is here, used from another folder (minutes, 2 GB each)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = {"3.11": "constraints.txt", "3.12": "constraints-latest.txt", "3.13": "constraints-latest.txt"}


def find_python(version: str) -> Path | None:
    """A Python of that version on the path, or of pyenv."""
    on_path = shutil.which(f"python{version}")
    of_pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for candidate in ([Path(on_path)] if on_path else []) + of_pyenv:
        asked = subprocess.run([candidate, "-c", "import venv"], capture_output=True, check=False)
        if asked.returncode == 0:
            return candidate
    return None


def run(*command: str | Path, cwd: Path) -> str:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "NEMO_LMPO"))}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**variables, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cwd / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}"
    return done.stdout


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version", PYTHONS)
def test_a_stranger_installs_the_wheel(version: str, tmp_path: Path) -> None:
    python = find_python(version)
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    source = tmp_path / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    source.mkdir()
    run("cp", "--parents", "-t", source, *listed.split("\0")[:-1], cwd=ROOT)
    run(python, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    programs = tmp_path / "venv" / "bin"
    pip = (programs / "python", "-m", "pip")
    run(*pip, "wheel", "--no-deps", "-w", tmp_path / "dist", source, cwd=tmp_path)
    [wheel] = (tmp_path / "dist").glob("*.whl")
    constraints = ROOT / PYTHONS[version]
    shutil.rmtree(source)
    run(*pip, "install", "-c", constraints, wheel, cwd=tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    command = programs / "nemo-lmpo"
    assert run(command, "--version", cwd=home).startswith("nemo-lmpo ")
    assert "lmpo_llama3_8b" in run(command, "train", "--list", cwd=home)
    run(command, "slurm", "templates", "slurm", cwd=home)
    assert (home / "slurm" / "cluster.env.example").is_file()
    said = run(command, "train", "lmpo_tiny", "trainer.max_steps=2", "data.validation.limit=8", cwd=home)
    assert "step 2/2" in said
    run(command, "export", "runs/lmpo_tiny", cwd=home)
    assert (home / "runs" / "lmpo_tiny" / "huggingface" / "model.safetensors").is_file()
    constraints_inside = next((tmp_path / "venv").rglob("nemo_lmpo/evaluate/scoring/constraints.txt"))
    assert "alpaca" in constraints_inside.read_text()
