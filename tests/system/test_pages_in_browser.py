"""The pages in a real browser: nothing leaves them, nothing runs off, everything can be read. Needs `chromium`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.evaluate.local_server import JsonHandler, serve
from tests.unit.test_text_from_outside import MAKERS, PLANTED

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

# What a page looks like: elements that stand out of the window and do not scroll, and the lowest contrast of a text.
LOOK = """
const numbers = text => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const paper = element => {
  for (let one = element; one; one = one.parentElement) {
    const color = numbers(getComputedStyle(one).backgroundColor);
    if (color.length < 4 || color[3] > 0) return color;
  }
  return [255, 255, 255];
};
const full = document.documentElement.scrollWidth;
let lowest = [99, ""];
for (const element of document.body.querySelectorAll("*")) {
  if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
  const [a, b] = [light(numbers(getComputedStyle(element).color)), light(paper(element))];
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (contrast < lowest[0]) lowest = [contrast, `${element.tagName} ${element.textContent.slice(0, 60)}`];
}
const dark = matchMedia("(prefers-color-scheme: dark)").matches;
parent.postMessage(JSON.stringify({lowest, dark, width: full, window: innerWidth}), "*");
"""


def browse(page: Path, *more: str, width: int = 1280, dark: bool = False) -> str:
    """The page's elements once it is loaded."""
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--window-size={width},900", scheme)
    profile = f"--user-data-dir={page.parent / 'profile'}"
    done = subprocess.run(
        [str(CHROMIUM), *fixed, profile, *more, page.as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str]]]:
    """A server, and the paths that it was asked for."""
    paths: list[str] = []

    class Handler(JsonHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_json(200, {})

        do_POST = do_GET

    with serve(Handler) as url:
        yield url, paths


def test_nothing_leaves_a_page(tmp_path: Path, asked: tuple[str, list[str]]) -> None:
    url, paths = asked
    host = url.removeprefix("http://")
    planted = " ".join(PLANTED.values()).replace("evil.example", host)
    planted = re.sub("[\ud800-\udfff]", "", planted)
    pages = []
    for make in MAKERS:
        (tmp_path / make.__name__).mkdir()
        pages += [page for page in make(tmp_path / make.__name__, planted) if page.suffix == ".html"]
    # Had the escaping a hole, the page's policy would hold; without it, this is what would leave.
    hole = (
        f'<img src="{url}/picture"><script>fetch("{url}/script")</script><iframe src="{url}/frame"></iframe>'
        f'<link rel="stylesheet" href="{url}/style"><style>body {{ background: url({url}/background) }}</style>'
        f'<form action="{url}/form"></form><script>document.forms[0].submit()</script>'
    )
    text = pages[0].read_text(encoding="utf-8")
    with_hole, control = tmp_path / "with_hole.html", tmp_path / "control.html"
    with_hole.write_text(text.replace("<body>", f"<body>{hole}"), encoding="utf-8")
    control.write_text(re.sub('<meta http-equiv="Content-Security[^>]*>', "", with_hole.read_text()), encoding="utf-8")
    for page in [*pages, with_hole]:
        browse(page)
        assert paths == [], page
    browse(control)
    assert {"/picture", "/script", "/frame", "/style"} <= set(paths)


def look(page: Path, *, width: int, dark: bool) -> dict[str, Any]:
    text = re.sub('<meta http-equiv="Content-Security[^>]*>', "", page.read_text(encoding="utf-8"))
    text = re.sub("<details>", "<details open>", text)
    shown, around = page.with_name(f"look_{page.name}"), page.with_name(f"around_{page.name}")
    shown.write_text(text.replace("</body>", f"<script>{LOOK}</script></body>"), encoding="utf-8")
    # Inside a frame: windows are not narrower than 500 pixels.
    around.write_text(
        '<pre id="found"></pre><script>onmessage = told => found.textContent = told.data</script>'
        f'<iframe src="{shown.name}" style="border: 0; width: {width}px; height: 800px"></iframe>'
    )
    dom = browse(around, "--virtual-time-budget=3000", width=1400, dark=dark)
    found = re.search(r'<pre id="found">(.+?)</pre>', dom, re.DOTALL)
    assert found is not None
    looked: dict[str, Any] = json.loads(unescape(found[1]))
    return looked


LONG = "a setting with words, and_one_without_any_place_to_break_it=" + "x" * 60


@pytest.mark.parametrize("make", MAKERS)
def test_pages_can_be_read_on_screens_and_phones(make: Callable[..., Any], tmp_path: Path) -> None:
    page = make(tmp_path, LONG)[0]
    for width, dark in ((1280, True), (390, False)):
        found = look(page, width=width, dark=dark)
        assert found["dark"] == dark
        assert found["window"] == width
        assert found["width"] <= width, "runs off"
        assert found["lowest"][0] >= 4.5, found["lowest"]
