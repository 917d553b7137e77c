"""What the package imports is declared, and no declared version has a hole that is known."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import nemo_lmpo
from nemo_lmpo.runtime.transformer_engine import TRIED

PACKAGE = Path(nemo_lmpo.__file__).resolve().parent
ROOT = PACKAGE.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = {canonicalize_name(one.name): one for one in map(Requirement, PROJECT["dependencies"])}
OPTIONAL = {
    canonicalize_name(one.name): one
    for listed in PROJECT["optional-dependencies"].values()
    for one in map(Requirement, listed)
}
WITH_OTHERS = {"markupsafe": "jinja2", "multiprocess": "datasets", "tokenizers": "transformers"}
"""Packages that come with one that is declared, in the version that it needs."""
SAFE_FROM = {
    "filelock": ("3.20.3", "CVE-2025-68146, CVE-2026-22701: a link in the place of a lock"),
    "jinja2": ("3.1.6", "CVE-2025-27516 and before: ways out of the sandbox"),
    "lightning": ("2.3.3", "CVE-2024-5980: files written anywhere"),
    "mlflow-skinny": ("3.5", "CVE-2025-14279: requests of web pages"),
    "pillow": ("12.1.1", "CVE-2026-25990: writes out of bounds"),
    "pyarrow": ("23.0.1", "CVE-2026-25087: use of freed memory while files are read"),
    "pyyaml": ("5.4", "CVE-2020-14343: code in YAML"),
    "requests": ("2.32.4", "CVE-2024-47081: passwords of .netrc to other hosts"),
    "sentencepiece": ("0.2.1", "CVE-2026-1260: memory errors by a model file"),
    "torch": ("2.10", "CVE-2026-24747: code in a file that is read with weights_only"),
    "tqdm": ("4.66.3", "CVE-2024-34062: code in an option"),
    "transformers": ("5.3", "code in checkpoints and configurations up to 5.2"),
    "urllib3": ("2.6.3", "CVE-2026-21441 and before: endless decompression"),
}


def third_party_imports() -> set[str]:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if "scoring" in path.parts:  # runs in an environment of its own
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"nemo_lmpo", "__future__"}


def test_what_is_imported_is_declared() -> None:
    by_module = packages_distributions()
    for module in sorted(third_party_imports()):
        for name in map(canonicalize_name, by_module.get(module, [])):
            assert name in DECLARED or name in OPTIONAL or WITH_OTHERS.get(name) in DECLARED, f"{module} is of {name}"


@pytest.mark.parametrize("name", SAFE_FROM)
def test_versions_with_known_holes_are_left_out(name: str) -> None:
    requirement = DECLARED.get(canonicalize_name(name)) or OPTIONAL[canonicalize_name(name)]
    [lowest] = [one.version for one in requirement.specifier if one.operator == ">="]
    assert Version(lowest) >= Version(SAFE_FROM[name][0]), SAFE_FROM[name][1]


def test_tried_versions_are_allowed_versions() -> None:
    for path in ROOT.glob("constraints*.txt"):
        for line in path.read_text().splitlines():
            if line and not line.startswith("#"):
                name, _, tried = re.sub(r"\s*#.*", "", line).partition("==")
                requirement = DECLARED.get(canonicalize_name(name)) or OPTIONAL.get(canonicalize_name(name))
                assert requirement is None or requirement.specifier.contains(tried), f"{path.name}: {line}"


def test_the_gpu_extra_installs_what_is_used() -> None:
    """Versions outside of megatron-core's own range would be left out, but for those that were tried here."""
    assert OPTIONAL[canonicalize_name("transformer-engine")].specifier == TRIED
    oldest, newest = (
        re.search(r"transformer-engine==(\S+)", (ROOT / name).read_text())
        for name in ("constraints-te.txt", "constraints-te-latest.txt")
    )
    assert oldest is not None
    assert newest is not None
    [lowest] = [one.version for one in TRIED if one.operator == ">="]
    [above] = [one.version for one in TRIED if one.operator == "<"]
    assert Version(oldest[1]).release[:2] == Version(lowest).release[:2]
    assert Version(newest[1]).release[1] + 1 == Version(above).release[1]


def test_installed_versions_are_allowed_versions() -> None:
    for name, requirement in DECLARED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        assert requirement.specifier.contains(found, prereleases=True), f"{name} {found} is not {requirement}"


@pytest.mark.parametrize("path", ["constraints.txt", "constraints-latest.txt"])
def test_everything_that_is_installed_is_pinned(path: str) -> None:
    """By `make constraints`, which says when: what a requirement asks for, and what that needs."""
    text = (ROOT / path).read_text()
    assert re.search(r"^# Made by `make constraints` on 20\d\d-\d\d-\d\d\.$", text, re.MULTILINE)
    pinned = {canonicalize_name(line.partition("==")[0]) for line in text.splitlines() if "==" in line}
    for name in [*DECLARED, *OPTIONAL]:
        if name not in ("transformer-engine", "nemo-lmpo"):  # by hand, and the project itself
            assert name in pinned, name
    for name in set(DECLARED) & pinned:
        for line in requires(name) or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": "", "platform_system": "Linux"}):
                assert canonicalize_name(needed.name) in pinned, f"{name} needs {needed.name}"
