"""The documentation as a site: every page is in its menu, links lead somewhere, versions lie beside each other."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
STAGE = runpy.run_path(str(ROOT / "docs" / "stage_site.py"))
PUBLISH = runpy.run_path(str(ROOT / "docs" / "publish_site.py"))


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "docs"
    STAGE["stage"](folder)
    return folder


def in_menu(menu: Any) -> list[str]:
    if isinstance(menu, str):
        return [menu]
    return [page for item in (menu.values() if isinstance(menu, dict) else menu) for page in in_menu(item)]


def test_every_page_is_in_the_menu_once(staged: Path) -> None:
    listed = in_menu(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    pages = [page.relative_to(staged).as_posix() for page in staged.rglob("*.md")]
    assert sorted(listed) == sorted(pages)


def test_links_stay_in_the_site(staged: Path) -> None:
    for page in staged.rglob("*.md"):
        text = re.sub(r"^```.*?^```[^\n]*$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s#]+)", text):
            if "://" not in target and not target.startswith("mailto:"):
                assert (page.parent / target).is_file(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("", "config.py"),
        ("https://example.org/o/n/", "[config.py](https://example.org/o/n/blob/main/nemo_lmpo/x.py)"),
    ],
)
def test_links_to_code(monkeypatch: pytest.MonkeyPatch, address: str, expected: str) -> None:
    monkeypatch.setenv("NEMO_LMPO_REPOSITORY", address)
    found = re.compile(r"\[(.*?)\]\((.*?)()\)").search("[config.py](../nemo_lmpo/x.py)")
    assert found is not None
    monkeypatch.setattr(Path, "exists", lambda self: True)
    assert STAGE["link"](found, "docs", "data.md") == expected


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="not a staged site"):
        STAGE["stage"](tmp_path)


def test_versions_beside_each_other(tmp_path: Path) -> None:
    site, published = tmp_path / "site", tmp_path / "published"
    for version in ("0.9", "0.10", "0.2"):
        site.mkdir(exist_ok=True)
        (site / "index.html").write_text(version)
        PUBLISH["publish"](site, published, version)
    listed = json.loads((published / "versions.json").read_text())
    assert [one["version"] for one in listed] == ["0.10", "0.9", "0.2"]
    assert [one["aliases"] for one in listed] == [["latest"], [], []]
    assert (published / "latest" / "index.html").read_text() == "0.10"
    assert (published / "0.2" / "index.html").read_text() == "0.2"
    for version in ("v1", "1", "../1.0"):
        with pytest.raises(ValueError, match=re.escape("give MAJOR.MINOR")):
            PUBLISH["publish"](site, published, version)
