"""What README and docs tell users exists: pages, settings, recipes, commands; and the API page is that of the code."""

from __future__ import annotations

import argparse
import dataclasses
import re
import runpy
import shlex
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest

from nemo_lmpo import cli
from nemo_lmpo.config.mode import MODE_WORDS
from nemo_lmpo.config.recipe import recipe_names
from nemo_lmpo.config.schema import all_keys
from nemo_lmpo.loss.options import OPTIONS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_GROUPS = ("model", "data", "loss", "optim", "trainer", "checkpoint", "logging")


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def shell_lines(path: Path) -> Iterator[str]:
    """Commands in code blocks, with continued lines joined and comments cut."""
    for block in re.findall(r"```(?:bash|sh|)\n(.*?)```", path.read_text(), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.partition("  #")[0].partition(" # ")[0].strip()


@pytest.mark.parametrize("path", PAGES, ids=names)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target or target.startswith(("mailto:", "#")):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve()
        assert found.exists(), f"{names(path)}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", found.read_text(), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{names(path)}: {target}"


def known_keys() -> set[str]:
    keys = {key for key in all_keys() if not key.startswith("loss.")}
    return keys | {f"loss.{of.name}" for loss in OPTIONS.values() for of in dataclasses.fields(loss)}


@pytest.mark.parametrize("path", PAGES, ids=names)
def test_settings_exist(path: Path) -> None:
    known = known_keys()
    for key in re.findall(rf"(?<![\w./])((?:{'|'.join(_GROUPS)})\.[a-z_0-9]+(?:\.[a-z_0-9]+)*)=", path.read_text()):
        group = any(other.startswith(f"{key}.") for other in known)
        example = path.name == "adding_a_loss.md" and key == "loss.label_smoothing"
        assert key in known or group or example or key.startswith("model.architecture"), f"{names(path)}: {key}"


@pytest.mark.parametrize("path", PAGES, ids=names)
def test_recipes_exist(path: Path) -> None:
    known = set(recipe_names())
    for name in re.findall(r"--config-name[= ]([a-z0-9_]+)", path.read_text()):
        assert name in known, f"{names(path)}: {name}"


@pytest.mark.parametrize("path", PAGES, ids=names)
def test_commands_parse(path: Path) -> None:
    """Each command line of the documentation is one that the command's parser takes."""
    for line in shell_lines(path):
        found = re.search(r"(?:nemo-lmpo |-m nemo_lmpo\.)([a-z]+)\b(.*)", line)
        # Placeholders and what only a shell expands.
        if found is None or re.search(r"[<>|$`*)]|\.\.\.|URL|SUITE|COMMAND", found[2]):
            continue
        name, rest = found[1], shlex.split(found[2])
        assert name in {command.name for command in cli.COMMANDS}, f"{names(path)}: {line}"
        if rest[:1] == ["--help"]:
            continue
        parser = next(command for command in cli.COMMANDS if command.name == name).build_parser(name)
        try:
            options, unknown = parser.parse_known_args(rest)
        except SystemExit:
            pytest.fail(f"{names(path)}: {line}")
        unknown = [word for word in unknown if "=" not in word or word.startswith("-")]
        assert not unknown, f"{names(path)}: {line}: {unknown}"
        overrides = [word for word in vars(options).get("overrides") or [] if "=" in word]
        for word in overrides:
            key = word.partition("=")[0].lstrip("+")
            assert key in {*known_keys(), *_GROUPS, *MODE_WORDS, "run_dir", "name", "compat", "setting"} or any(
                key.startswith(f"{group}.architecture") for group in _GROUPS
            ), f"{names(path)}: {word}"


def test_the_hubs_command_is_todays() -> None:
    """`huggingface-cli`, which docs named, is gone; what fills the hub's cache is a command that is installed."""
    installed = {script.name for script in distribution("huggingface_hub").entry_points}
    named = set()
    for path in PAGES:
        text = path.read_text()
        assert "huggingface-cli" not in text, names(path)
        named |= set(re.findall(r"(?:^|`)(\S+) (?:download|upload|auth login)\b", text, flags=re.MULTILINE))
    assert named
    assert named <= installed


@pytest.mark.parametrize("path", PAGES, ids=names)
def test_files_of_the_package_exist(path: Path) -> None:
    """Paths such as `data/pack.py`, from the package, the checkout or the tests."""
    for file in re.findall(r"`(?:nemo_lmpo/)?([a-z_]+/[a-z_/]+\.py)`", path.read_text()):
        if path.name == "adding_a_loss.md" and file == "loss/cdpo.py":  # its example
            continue
        places = (ROOT / "nemo_lmpo", ROOT, ROOT / "tests")
        assert any((place / file).exists() for place in places), f"{names(path)}: {file}"


def test_readme_tells_the_papers_values() -> None:
    """The table of recipes is that of the recipes themselves."""
    from tests.unit.composed import recipe

    rows = re.findall(r"^\| `(lmpo_\w+)` \| (\S+) \| (.*) \|$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(rows) == 4
    for name, start, values in rows:
        config = recipe(name)
        assert config.model.restore_from_path == start
        found = [float(value) for value in values.split(" | ")]
        assert found == [config.loss.beta, config.loss.log_h, config.loss.lam, config.optim.lr]


@pytest.mark.processes("griffe asks git where the sources are")
def test_the_api_page_is_that_of_the_code() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "generate_api.py"))
    assert (ROOT / "docs" / "api.md").read_text() == made["page"](), "run `make api`"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    missing = [path.name for path in (ROOT / "docs").glob("*.md") if f"({path.name}" not in index]
    assert missing == ["index.md"]


def test_help_of_every_command_names_its_options() -> None:
    for command in cli.COMMANDS:
        for action in command.build_parser(command.name)._actions:
            assert isinstance(action, argparse._SubParsersAction) or action.help, f"{command.name}: {action.dest}"
