"""A folder of data holds no code: nothing of the working directory is imported, whatever it is called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_lmpo.evaluate.environment import VARIABLE, packages

NAMES = (
    *("hydra_plugins", "hydra_plugins/evil", "wandb", "mlflow", "apex", "amp_C", "transformer_engine", "flash_attn"),
    *("sentencepiece", "tiktoken", "torch", "transformers", "omegaconf", "numpy", "datasets", "argcomplete", "yaml"),
)
CHECKOUT = Path(__file__).resolve().parents[2]


def trap(tmp_path: Path, names: tuple[str, ...]) -> Path:
    """A folder with modules, each of which leaves a file when it is imported."""
    for name in names:
        package = tmp_path / "data" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r} + ' ')\n")
    return tmp_path / "data"


@pytest.fixture
def trapped(tmp_path: Path) -> Path:
    return trap(tmp_path, NAMES)


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(CHECKOUT), **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "nemo_lmpo.train", "--config-name", "lmpo_tiny", "dry_run=true"],
        ["-m", "nemo_lmpo", "check", "lmpo_tiny"],
        ["-m", "nemo_lmpo.convert", "--help"],
    ],
    ids=lambda command: command[1],
)
def test_commands_import_nothing_from_it(command: list[str], trapped: Path) -> None:
    done = run(trapped, *command)
    assert done.returncode == 0, done.stderr
    assert not (trapped.parent / "imported").exists(), (trapped.parent / "imported").read_text()


def test_the_trap_works(tmp_path: Path) -> None:
    """And a folder that the user names is searched."""
    trapped = trap(tmp_path, ("hydra_plugins", "hydra_plugins/evil"))
    command = ["-m", "nemo_lmpo.train", "--config-name", "lmpo_tiny", "--show-config"]
    run(trapped, *command, PYTHONPATH=os.pathsep.join((str(CHECKOUT), str(trapped))))
    assert "hydra_plugins/evil" in (trapped.parent / "imported").read_text()


@pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"set {VARIABLE} (make eval-env)")
def test_the_scoring_environment_imports_nothing_from_it(trapped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (trapped / "json.py").write_text(f"open({str(trapped.parent / 'imported')!r}, 'a').write('json ')\n")
    monkeypatch.chdir(trapped)
    assert "alpaca_eval" in packages()
    assert not (trapped.parent / "imported").exists()
