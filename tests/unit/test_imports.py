"""Conventions that hold the code together: who may import whom, and how long things may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import nemo_lmpo

PACKAGE = Path(nemo_lmpo.__file__).resolve().parent
FILES = sorted(PACKAGE.rglob("*.py"))
# Rooms from the bottom up. A module may import its own room and those of lower floors, never a neighbour.
ROOMS = (
    ("errors",),
    ("settings",),
    ("loss", "runtime"),
    ("formats",),
    ("config",),
    ("parallel", "data", "report", "sizing"),
    ("model", "answers"),
    ("checkpoint", "monitor"),
    ("training",),
    ("trace",),
    ("train", "doctor", "slurm", "generate", "evaluate", "convert", "export", "fetch", "pairs"),
    ("paper", "rounds"),
    ("cli",),
    ("compare", "__main__"),
)
FLOOR = {name: floor for floor, names in enumerate(ROOMS) for name in names}
# A run ends with its export, and a model card shows evaluations.
NEIGHBORS_THAT_MAY = {("export", "evaluate"), ("train", "export")}
NOT_FROM_OUTSIDE = {"loss": ("megatron", "torch.distributed", "nemo", "lightning", "transformers")}
LONGEST_FILE, LONGEST_FUNCTION = 400, 60


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Dotted names and their lines, also of imports inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            yield module, node.lineno
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def own_rooms(path: Path) -> Iterator[tuple[str, int]]:
    for name, line in imported(path):
        parts = name.split(".")
        if parts[0] == "nemo_lmpo" and len(parts) > 1 and parts[1] in FLOOR:
            yield parts[1], line


def test_every_module_has_its_floor() -> None:
    rooms = {room(path) for path in FILES} - {"__init__"}
    assert rooms <= set(FLOOR), f"say in this test where they stand: {rooms - set(FLOOR)}"


def test_beside_the_rooms_stand_only_the_errors_settings_and_the_commands() -> None:
    known = {"__init__.py", "__main__.py", "cli.py", "errors.py", "settings.py", "train.py", "compare.py"}
    assert {path.name for path in PACKAGE.glob("*.py")} <= known


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    own = room(path)
    if own == "__init__":
        return
    if path.name == "__main__.py":  # an entry, which nobody imports
        own = "__main__"
    for other, line in own_rooms(path):
        place = f"{path.name}:{line}: {own} imports {other}"
        assert other == own or FLOOR[other] < FLOOR[own] or (own, other) in NEIGHBORS_THAT_MAY, place


@pytest.mark.parametrize("own", NOT_FROM_OUTSIDE)
def test_pure_rooms_know_no_engine(own: str) -> None:
    for path in (PACKAGE / own).rglob("*.py"):
        for name, line in imported(path):
            for forbidden in NOT_FROM_OUTSIDE[own]:
                assert not f"{name}.".startswith(f"{forbidden}."), f"{path.name}:{line}: {name}"


def test_files_and_functions_stay_short() -> None:
    long = []
    for path in FILES:
        text = path.read_text()
        lines = text.count("\n")
        if lines > LONGEST_FILE:
            long.append(f"{path.name} has {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > LONGEST_FUNCTION:
                    long.append(f"{path.name}:{node.lineno} {node.name} has {length} lines")
    assert not long, "\n".join(long)


def test_code_names_only_what_can_be_reached() -> None:
    """Nothing outside of a checkout may be needed: no absolute paths of one machine."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith(("/home/", "/work/", "/root/")), f"{path.name}:{node.lineno}"


def test_pickle_is_never_loaded_freely() -> None:
    """`torch.load` must say weights_only=True; pickle itself is for the safe reader, and for what own forks left."""
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = node.func.value
            if isinstance(owner, ast.Name) and (owner.id, node.func.attr) == ("torch", "load"):
                safe = [word for word in node.keywords if word.arg == "weights_only"]
                assert safe, f"{path.name}:{node.lineno}"
                assert isinstance(safe[0].value, ast.Constant), f"{path.name}:{node.lineno}"
                assert safe[0].value.value is True, f"{path.name}:{node.lineno}"
            if isinstance(owner, ast.Name) and owner.id == "pickle" and node.func.attr in ("load", "loads"):
                found.append(path.parent.name + "/" + path.name)
    assert found == ["checkpoint/writers.py"]


def test_no_default_remembers_the_environment() -> None:
    """`datasets` puts a copy in `os.environ`'s place after a parallel map: a default would keep the old one."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.arguments):
                for default in [*node.defaults, *node.kw_defaults]:
                    assert default is None or ast.unparse(default) != "os.environ", f"{path.name}:{default.lineno}"


def test_no_view_of_a_stream_outlives_it() -> None:
    """`BytesIO.getvalue` copies nothing either; a view that outlives its stream is an error when that is freed."""
    for path in FILES:
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert "getbuffer" not in names, path
