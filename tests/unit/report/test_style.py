"""The style of all pages: every text has enough contrast on every surface, in light and in dark."""

from __future__ import annotations

import re
from itertools import product

import pytest

from nemo_lmpo.report.blocks import Text, to_html

STYLE = re.search(r"<style>(.*?)</style>", to_html("a", [Text("a")]), re.DOTALL)[1]
TEXTS, SURFACES = ("text", "muted", "good", "open"), ("bg", "card")


def luminance(color: str) -> float:
    """By WCAG 2.1."""
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_by_hand() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # the well-known grey that just fails


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_texts_can_be_read_on_every_surface(scheme: int) -> None:
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[scheme]))
    for text, surface in product(TEXTS, SURFACES):
        assert contrast(colors[text], colors[surface]) >= 4.5, (text, surface)


def test_rules_take_their_colors_from_the_scheme() -> None:
    """A color of its own is right in one scheme only; the paper behind pictures, which have theirs, is white."""
    rules = re.sub(r":root \{.*?\}", "", STYLE, flags=re.DOTALL)
    for selector, body in re.findall(r"([^{}]+)\{([^{}]*)\}", rules):
        for name, value in re.findall(r"(color|background(?:-color)?): ([^;}]+)", body):
            allowed = ("#ffffff",) if selector.strip() == "img" else ()
            assert value.strip().startswith("var(--") or value.strip() in allowed, f"{selector.strip()}: {name}"
