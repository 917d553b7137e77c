"""The scoring environment is made once, anew when its versions change, and never over something else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nemo_lmpo.errors import ConfigError, UserError
from nemo_lmpo.evaluate import environment, make_environment
from nemo_lmpo.evaluate.environment import VARIABLE, scoring_python
from tests.unit.test_dependencies import ROOT

PIP = """#!{python}
import pathlib, sys
here = pathlib.Path(sys.argv[0]).parent.parent
with (here / "asked").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if "litellm" in sys.argv and (here.parent / "broken").exists():
    sys.exit("ERROR: No matching distribution found for litellm")
"""
PYTHON = """#!{python}
import pathlib, sys
assert sys.argv[1:4] == ["-m", "venv", "--clear"]
folder = pathlib.Path(sys.argv[4])
(folder / "bin").mkdir(parents=True, exist_ok=True)
(folder / "asked").unlink(missing_ok=True)
(folder / ".installed").unlink(missing_ok=True)
(folder / "pyvenv.cfg").touch()
program = folder / "bin" / "python"
program.write_text({pip!r})
program.chmod(0o755)
"""


@pytest.fixture
def python(tmp_path: Path) -> str:
    """A program that makes environments whose pip writes down what it is asked for. The gate makes the real one."""
    program = tmp_path / "python3"
    pip = PIP.format(python=sys.executable)
    program.write_text(PYTHON.format(python=sys.executable, pip=pip))
    program.chmod(0o755)
    return str(program)


@pytest.mark.processes("what is tested starts pip")
def test_it_is_made_once_and_anew_for_other_versions(
    tmp_path: Path, python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new" / "scoring"
    interpreter = make_environment.make_environment(folder, python)
    asked = (folder / "asked").read_text().splitlines()
    assert interpreter == folder / "bin" / "python"
    assert [line.split()[-1] for line in asked] == ["scikit-learn", "litellm"]
    assert all(f"-c {make_environment.CONSTRAINTS}" in line for line in asked)
    assert "--no-deps" in asked[1]
    (folder / "asked").unlink()
    make_environment.make_environment(folder, python)
    assert not (folder / "asked").exists()
    other = tmp_path / "constraints.txt"
    other.write_text("torch==9\n")
    monkeypatch.setattr(make_environment, "CONSTRAINTS", other)
    make_environment.make_environment(folder, python)
    assert len((folder / "asked").read_text().splitlines()) == 2


@pytest.mark.processes("what is tested starts pip")
def test_a_failure_is_one_sentence_and_the_next_call_starts_anew(tmp_path: Path, python: str) -> None:
    folder = tmp_path / "scoring"
    (tmp_path / "broken").touch()
    with pytest.raises(UserError, match="litellm failed with status 1: ERROR: No matching distribution"):
        make_environment.make_environment(folder, python)
    (tmp_path / "broken").unlink()
    make_environment.make_environment(folder, python)
    assert len((folder / "asked").read_text().splitlines()) == 2


def test_nothing_else_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ConfigError, match="is not a virtual environment"):
        make_environment.make_environment(tmp_path, sys.executable)
    with pytest.raises(ConfigError, match="is not a program"):
        make_environment.make_environment(tmp_path / "new", "python9")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_it_is_found_where_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no scoring environment; make it with `nemo-lmpo evaluate"):
        scoring_python()
    there = environment.default_environment() / "bin" / "python"
    assert there.is_relative_to(tmp_path)
    there.parent.mkdir(parents=True)
    there.symlink_to(sys.executable)
    assert scoring_python() == there


def test_the_versions_come_with_the_package() -> None:
    assert make_environment.CONSTRAINTS.is_relative_to(ROOT / "nemo_lmpo")
    assert "alpaca-eval==" in make_environment.CONSTRAINTS.read_text()
