"""YAML from outside is read in bounded time and memory, and nothing that quotes a value writes it out whole."""

from __future__ import annotations

import ast
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import nemo_lmpo
from nemo_lmpo.answers.trained_model import read_training_config
from nemo_lmpo.checkpoint.run_directory import RunDirectory
from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.errors import CheckpointError, ConfigError, shown
from nemo_lmpo.report.read import read_config
from nemo_lmpo.runtime.safe_yaml import load_yaml

LEVELS = 12
LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, LEVELS)]
    + [f"name: *a{LEVELS - 1}"]
)
MERGES = "\n".join(
    ["m0: &m0 {a: 1, b: 2}"] + [f"m{n}: &m{n} {{'<<': [{', '.join([f'*m{n - 1}'] * 9)}]}}" for n in range(1, LEVELS)]
)


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """What takes gigabytes fails instead of filling the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (LAUGHS, "more than 100,000 values once its aliases are written out"),
        (MERGES, "more than 100,000 values once its aliases are written out"),
        ("a: &a [*a]", "a value that contains itself"),
        ("a: &a {b: {c: *a}}", "a value that contains itself"),
        ("[" * 100_000, "maximum nesting depth"),
        ("- " * 100_000, "maximum nesting depth"),
        ("a: 1999-99-99", "month must be in"),
        ("a: " + "9" * 5000, "digits"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: b: c", "mapping values are not allowed"),
        ("x" * (2**20 + 1), "1,048,577 bytes"),
        (b"\xff\xfe\x00", ""),
        ("a: \x00", "control characters"),
        ("a: *b", "undefined alias"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else "bytes",
)
def test_what_is_refused(text: str | bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why) as info:
        load_yaml(text)
    assert str(info.value).isprintable()
    assert len(str(info.value)) <= 300


@pytest.mark.parametrize(
    "text", ["", "a: 1", "- [1, 2.5, yes, null]", "b: &b {c: 1}\nd: *b\ne: *b\nf: {<<: *b, g: 2}", "x"]
)
def test_the_rest_is_as_pyyaml_reads_it(text: str) -> None:
    assert load_yaml(text) == yaml.safe_load(text)


def test_every_reader_of_a_file_from_outside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step_0000001").mkdir(parents=True)
    (run / "config.yaml").write_text(LAUGHS)
    assert read_config(run) == {}
    assert "config.yaml cannot be read (more than 100,000 values" in caplog.text
    with pytest.raises(ConfigError, match=r"config\.yaml is not readable"):
        RunDirectory(load_recipe("lmpo_tiny", [f"run_dir={run}"])).check_owner()
    with pytest.raises(CheckpointError, match=r"config\.yaml is not readable"):
        read_training_config(run)
    (tmp_path / "own.yaml").write_text(f"defaults: [lmpo_tiny, _self_]\n{LAUGHS}")
    with pytest.raises(ConfigError, match=r"own\.yaml cannot be read \(more than 100,000 values"):
        load_recipe("own", [], config_dir=tmp_path)


def test_own_recipes_may_use_aliases(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "defaults: [lmpo_tiny, _self_]\noptim: {lr: &rate 1e-5}\nloss: {sft_weight: *rate}\n"
    )
    config = load_recipe("own", [], config_dir=tmp_path)
    assert config.loss.sft_weight == config.optim.lr == 1e-5


def test_yaml_is_read_in_one_place() -> None:
    """`alpaca_judge.py` reads a file of the package `alpaca_eval`, in that package's environment."""
    package = Path(nemo_lmpo.__file__).parent
    readers = ("safe_load", "load", "load_all", "safe_load_all", "unsafe_load", "full_load")
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id == "yaml" and node.attr in readers
    }
    assert found == {"evaluate/scoring/alpaca_judge.py"}


def laughs() -> list[object]:
    value: list[object] = ["x"] * 9
    for _ in range(LEVELS):
        value = [value] * 9
    return value


def of_itself() -> list[object]:
    value: list[object] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "value",
    [
        laughs(),
        {"a": laughs(), "b": 1},
        of_itself(),
        "x" * 10**8,
        b"x" * 10**8,
        "\x1b" * 10**7,
        10**5000,
        [10**5000],
        list(range(10**6)),
        {n: n for n in range(10**6)},
        set(range(10**6)),
        ("a\nb\x1b[31m", "\u202e"),
        {"\r": ["\ud800"]},
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_shown_of_a_value_is_short_and_printable(value: object) -> None:
    text = shown(value)
    assert len(text) <= 80
    assert text.isprintable()
    assert text.isascii() or value is None


@pytest.mark.parametrize("value", ["a", "ä", {"b": 1, "a": [2]}, (1, "x"), None, 1.5, "x" * 200, [1] * 100])
def test_small_values_are_shown_as_before(value: object) -> None:
    whole = repr(value)
    assert shown(value) == (whole if len(whole) <= 80 else whole[:77] + "...")
