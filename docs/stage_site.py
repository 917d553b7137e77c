"""Lay out the documentation as a site generator wants it: `python docs/stage_site.py build/docs`.

Pages that live outside of `docs/`, where readers of the repository look for them (`CHANGELOG.md`, ...), are copied to
`project/`, and links between the two lead to the right one. Links to files that are no page lead to the repository
where its address is known, and are text elsewhere.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "CHANGELOG.md": "project/changelog.md",
    "CODE_OF_CONDUCT.md": "project/conduct.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "README.md": "index.md",
    "SECURITY.md": "project/security.md",
    "benchmarks/results/README.md": "project/benchmarks.md",
    "examples/README.md": "examples.md",
}
"""Files of the repository, and the page of the site that shows each."""
REPOSITORY = "NEMO_LMPO_REPOSITORY"
"""Variable with the address of the repository in a browser, such as `https://github.com/OWNER/NAME`."""
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"(^```.*?^```[^\n]*$)", re.MULTILINE | re.DOTALL)


def stage(folder: Path) -> None:
    """Write all pages and pictures to `folder`, which is made anew.

    Raises:
        FileExistsError: it holds something else than a site that this function laid out.
    """
    mark = folder / ".staged"
    if folder.exists() and not mark.is_file():
        raise FileExistsError(f"{folder} exists and is not a staged site; remove it or name another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.touch()
    for source in sorted((ROOT / "docs").rglob("*")):
        name = source.relative_to(ROOT / "docs").as_posix()
        if source.suffix == ".md":
            write_page(folder, f"docs/{name}", name)
        elif source.is_file() and source.suffix in (".png", ".svg", ".css"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / name)
    for source_name, page in PAGES.items():
        if page != "index.md":
            write_page(folder, source_name, page)


def write_page(folder: Path, source: str, page: str) -> None:
    """Copy the file `source` of the repository to the page `page`, with links that lead somewhere there."""
    parts = _FENCE.split((ROOT / source).read_text(encoding="utf-8"))
    text = "".join(
        part if index % 2 else _LINK.sub(lambda found: link(found, posixpath.dirname(source), page), part)
        for index, part in enumerate(parts)
    )
    (folder / page).parent.mkdir(parents=True, exist_ok=True)
    (folder / page).write_text(text, encoding="utf-8")


def link(found: re.Match[str], folder: str, page: str) -> str:
    """A link of a file in `folder` as the page `page` has it."""
    text, target, anchor = found[1], found[2], found[3] or ""
    if "://" in target or target.startswith("mailto:"):
        return found[0]
    path = posixpath.normpath(posixpath.join(folder, target))
    there = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
    if there is not None and (path in PAGES or (ROOT / path).is_file()):
        return f"[{text}]({os.path.relpath(there, posixpath.dirname(page) or '.')}{anchor})"
    if not (ROOT / path).exists():
        return found[0]  # the site generator names it
    address = os.environ.get(REPOSITORY)
    return f"[{text}]({address.rstrip('/')}/blob/main/{path}{anchor})" if address else text


if __name__ == "__main__":
    try:
        stage(Path(sys.argv[1]))
    except FileExistsError as error:
        sys.exit(f"error: {error}")
