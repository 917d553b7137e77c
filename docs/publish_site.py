"""Put a built site among its other versions: `python docs/publish_site.py build/site PUBLISHED VERSION`.

`PUBLISHED/VERSION` becomes the site, `PUBLISHED/latest` the newest version, and `PUBLISHED/versions.json` what the
pages' selector of versions reads. `PUBLISHED` is any folder that a web server shows, as the branch of GitHub Pages.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

_VERSION = re.compile(r"\d+\.\d+")
_START = (
    '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=latest/">'
    '<a href="latest/">latest</a>\n'
)


def publish(site: Path, published: Path, version: str) -> None:
    """Copy a site to its version's folder, and to `latest` where no newer version is there.

    Raises:
        ValueError: the version is no `MAJOR.MINOR`, or `site` is no built site.
    """
    if not _VERSION.fullmatch(version):
        raise ValueError(f"the version is {version!r}; give MAJOR.MINOR, such as 0.2")
    if not (site / "index.html").is_file():
        raise ValueError(f"{site} holds no index.html; build the site with `make docs`")
    known = {one.name for one in published.glob("*") if _VERSION.fullmatch(one.name)} | {version}
    newest_first = sorted(known, key=lambda one: tuple(map(int, one.split("."))), reverse=True)
    for name in (version, "latest")[: 2 if newest_first[0] == version else 1]:
        shutil.rmtree(published / name, ignore_errors=True)
        shutil.copytree(site, published / name)
    listed = [
        {"version": one, "title": one, "aliases": ["latest"] if one == newest_first[0] else []} for one in newest_first
    ]
    (published / "versions.json").write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    (published / "index.html").write_text(_START, encoding="utf-8")


if __name__ == "__main__":
    try:
        publish(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    except ValueError as error:
        sys.exit(f"error: {error}")
